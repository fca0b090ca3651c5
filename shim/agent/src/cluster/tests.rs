use serde_json::{Value, json};

use super::*;

const UID: &str = "7c0d2f5e-0000-4000-8000-000000000001";
const ID: &str = "0123456789abcdef";

fn container() -> PodContainer {
    PodContainer {
        namespace: "team-a".to_owned(),
        pod: "web-0".to_owned(),
        uid: UID.to_owned(),
        id: ID.to_owned(),
    }
}

fn pod(metadata: Value, status: Value) -> Pod {
    let pod = json!({"metadata": metadata, "spec": {"nodeName": "node-1", "containers": []}, "status": status});
    serde_json::from_value(pod).unwrap()
}

fn status(name: &str, id: &str, ready: bool) -> Value {
    json!({"name": name, "containerID": id, "ready": ready, "image": "", "imageID": "", "restartCount": 0})
}

#[test]
fn a_container_is_ready_when_its_own_status_says_so() {
    let ours = format!("containerd://{ID}");
    let seen = |status: Value| container().seen(&pod(json!({"uid": UID}), status));
    assert_eq!(seen(json!({})), Seen::NotYet);
    assert_eq!(
        seen(json!({"phase": "Pending", "containerStatuses": []})),
        Seen::NotYet
    );
    // Another one of its pod; and one of its name that was there before it was started again.
    let others = [
        status("beside", "containerd://fedcba", true),
        status("main", &ours, false),
    ];
    assert_eq!(seen(json!({"containerStatuses": others})), Seen::NotYet);
    let before = [status("main", "containerd://fedcba", true)];
    assert_eq!(seen(json!({"containerStatuses": before})), Seen::NotYet);
    // Its pod may not be, for one beside it is not.
    let own = [
        status("main", &ours, true),
        status("beside", "containerd://fedcba", false),
    ];
    assert_eq!(seen(json!({"containerStatuses": own})), Seen::Ready);
    let before_others = [status("sidecar", &ours, true)];
    assert_eq!(
        seen(json!({"initContainerStatuses": before_others})),
        Seen::Ready
    );
}

#[test]
fn another_pod_of_its_name_is_none_of_its() {
    let ready = json!({"containerStatuses": [status("main", &format!("containerd://{ID}"), true)]});
    let seen = |metadata: Value| container().seen(&pod(metadata, ready.clone()));
    let other = "7c0d2f5e-0000-4000-8000-000000000002";
    assert!(matches!(seen(json!({"uid": other})), Seen::Gone(_)));
    assert!(matches!(seen(json!({})), Seen::Gone(_)));
    // What the apiserver has of a static pod.
    let copy = json!({"uid": other, "annotations": {STATIC_UID: UID}});
    assert_eq!(seen(copy), Seen::Ready);
}

#[test]
fn a_pod_that_has_ended_is_not_waited_for() {
    for phase in ["Succeeded", "Failed"] {
        let seen = container().seen(&pod(json!({"uid": UID}), json!({"phase": phase})));
        assert!(matches!(seen, Seen::Gone(_)), "{seen:?}");
    }
}

#[test]
fn it_is_watched_alone_and_as_a_nodes_own() {
    let params = container().selected(&pod(json!({"uid": UID}), json!({})));
    assert_eq!(
        params.field_selector.as_deref(),
        Some("metadata.name=web-0,spec.nodeName=node-1")
    );
}
