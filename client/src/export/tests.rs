//! What an export leaves on disk: both files whole, or nothing.

use std::{fs, path::Path};

use crate::{
    Error,
    fake::{Fake, Quirk},
};

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn an_export_writes_the_announced_bytes() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a/b");
    let export = client.export_adapter(&session, &out).await.unwrap();
    assert_eq!(export.rank, 256);
    assert_eq!(
        names(&out),
        ["adapter_config.json", "adapter_model.safetensors"]
    );
    assert_eq!(
        fs::read(out.join("adapter_config.json")).unwrap(),
        b"{\"peft_type\": \"LORA\"}"
    );
    assert_eq!(
        fs::read(out.join("adapter_model.safetensors")).unwrap(),
        vec![3; 10_000]
    );
    let sizes: Vec<u64> = export.files.iter().map(|file| file.bytes).collect();
    assert_eq!(sizes, [21, 10_000]);
}

#[tokio::test]
async fn a_failed_export_leaves_no_file() {
    for (quirk, integrity) in [
        (Quirk::WrongBytes, true),
        (Quirk::ShortFile, true),
        (Quirk::Outside, false),
    ] {
        let fake = Fake::with_quirk(quirk).await;
        let (client, session) = fake.client_and_session().await;
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let error = client.export_adapter(&session, &out).await.unwrap_err();
        match integrity {
            true => assert!(
                matches!(error, Error::Integrity { .. }),
                "{quirk:?}: {error:?}"
            ),
            false => assert!(
                matches!(error, Error::Protocol { .. }),
                "{quirk:?}: {error:?}"
            ),
        }
        assert!(names(&out).is_empty(), "{quirk:?}: {:?}", names(&out));
        assert_eq!(names(folder.path()), ["out"], "{quirk:?}");
    }
}

#[tokio::test]
async fn a_folder_that_cannot_be_is_named() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = client
        .export_adapter(&session, &file.path().join("x"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
}
