use super::*;

fn document(text: &str) -> Arc<Document> {
    Arc::new(Document {
        text: text.to_owned(),
        tokens: Vec::new(),
    })
}

#[test]
fn a_foreign_context_shares_no_document_with_ones_own() {
    let shared = document("shared");
    let contexts = vec![
        vec![document("a"), Arc::clone(&shared)],
        vec![Arc::clone(&shared), document("b")],
        vec![document("c")],
        // The same text in another row.
        vec![document("c"), document("d")],
    ];
    assert_eq!(foreign(0, &contexts), Some(2));
    assert_eq!(foreign(1, &contexts), Some(2));
    assert_eq!(foreign(2, &contexts), Some(0));
    assert_eq!(foreign(3, &contexts), Some(0));
    assert_eq!(foreign(0, &contexts[..2]), None);
    assert_eq!(foreign(0, &contexts[..1]), None);
    assert_eq!(foreign(7, &contexts), None);
}

#[test]
fn names_of_tasks_are_those_of_reports() {
    for task in Task::ALL {
        assert_eq!(serde_json::to_value(task).unwrap(), task.name());
    }
    for method in crate::Method::ALL {
        assert_eq!(serde_json::to_value(method).unwrap(), method.name());
    }
}
