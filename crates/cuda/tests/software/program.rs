//! The program that travels to a GPU, on the software device: its check finds nothing wrong, what is wrong it finds, its bench runs.

use std::process::{Command, Output};

use testkit::golden_dir;

use crate::software;

fn imprint_cuda(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_imprint-cuda"))
        .args(arguments)
        .output()
        .unwrap()
}

fn on_software(verb: &[&str]) -> Output {
    let library = software().to_str().unwrap();
    let mut arguments = vec!["--driver", library, "--cublas", library, "--tiny"];
    arguments.extend(verb);
    imprint_cuda(&arguments)
}

#[test]
fn the_check_of_a_gpu_passes_on_the_software_device() {
    let golden = golden_dir();
    let mut verb = vec!["check"];
    if let Some(folder) = &golden {
        verb.extend(["--golden", folder.to_str().unwrap()]);
    }
    let output = on_software(&verb);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains("ok") && !said.contains("WRONG"), "{said}");
    assert!(
        golden.is_none() || said.matches("parallel").count() == 4,
        "{said}"
    );
    testkit::report(&said);
}

#[test]
fn the_bench_of_a_gpu_runs_on_the_software_device() {
    let output = on_software(&["bench"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let figures: Vec<serde_json::Value> = said
        .lines()
        .skip(1)
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for name in [
        "ceiling",
        "quantised linear",
        "dequantise",
        "prefill",
        "ingest",
        "decode of 3, 20 keys, cores: all distinct",
        "swap in",
        "read-out Svd",
        "read-out Ridge",
    ] {
        assert!(
            figures
                .iter()
                .any(|figure| figure["name"].as_str().unwrap().starts_with(name)),
            "{name}"
        );
    }
}

#[test]
fn without_a_device_or_its_code_the_program_says_so_and_fails() {
    let nowhere = imprint_cuda(&["--driver", "/nowhere/libcuda.so", "check"]);
    assert!(!nowhere.status.success());
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("/nowhere/libcuda.so"));
    let nothing = on_software(&["check", "--golden", "/nowhere"]);
    assert!(!nothing.status.success());
}
