//! Requests that fail.

use rekindle_dataset::{DatasetError, Verification};

use crate::{
    liar::{Fault, Liar, Object, Op},
    node::{MIB, Node, pattern, read},
};

type Expect = fn(&DatasetError) -> bool;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_retry_helps_fails_at_once() {
    let denied: Expect = |e| matches!(e, DatasetError::Denied { .. });
    let missing: Expect = |e| matches!(e, DatasetError::Missing { .. });
    let answer: Expect = |e| matches!(e, DatasetError::Answer { .. });
    for (op, status, code, expected) in [
        (Op::List, 403, "AccessDenied", denied),
        (Op::Head, 403, "AccessDenied", denied),
        (Op::Get, 403, "AccessDenied", denied),
        (Op::List, 404, "NoSuchBucket", missing),
        (Op::Head, 404, "NoSuchKey", missing),
        (Op::Get, 404, "NoSuchKey", missing),
        (Op::List, 400, "AuthorizationHeaderMalformed", answer),
        (Op::Get, 400, "InvalidRequest", answer),
    ] {
        let store = Liar::start(
            vec![("m/a", Object::new(pattern(1, 100)))],
            move |request, _| match request.op == op {
                true => Fault::Answer(status, code),
                false => Fault::Serve,
            },
        );
        let node = Node::new(store.address);
        let error = node.acquire("s3://bucket/m/").await.unwrap_err();
        let what = format!("{op:?} {status}: {error}");
        assert!(expected(&error), "{what}");
        assert!(
            !error.is_retryable() && error.to_string().contains(&status.to_string()),
            "{what}"
        );
        assert_eq!(store.count(op), 1, "{what}");
        node.assert_nothing_published(&what);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_passes_is_waited_for() {
    for (op, status, code) in [
        (Op::List, 503, "SlowDown"),
        (Op::Head, 503, "SlowDown"),
        (Op::Get, 503, "SlowDown"),
        (Op::Get, 500, "InternalError"),
        (Op::Get, 429, "TooManyRequests"),
        (Op::Get, 400, "RequestTimeout"),
    ] {
        let bytes = pattern(2, 3 * MIB + 17);
        let object = Object::new(bytes.clone());
        let store = Liar::start(vec![("m/a", object)], move |request, _| {
            match request.op == op && request.nth <= 3 {
                true => Fault::Answer(status, code),
                false => Fault::Serve,
            }
        });
        let node = Node::new(store.address);
        let ready = node.acquire("s3://bucket/m/").await;
        let ready = ready.unwrap_or_else(|e| panic!("{op:?} {status}: {e}"));
        assert_eq!(read(&ready, "a"), bytes, "{op:?} {status}");
        assert!(!ready.hit && store.count(op) > 3, "{op:?} {status}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_pass_is_given_up_and_may_be_tried_again() {
    for op in [Op::List, Op::Head, Op::Get] {
        let object = Object::new(pattern(3, 100));
        let store = Liar::start(vec![("m/a", object)], move |request, _| {
            match request.op == op {
                true => Fault::Answer(503, "SlowDown"),
                false => Fault::Serve,
            }
        });
        let node = Node::new(store.address);
        let error = node.acquire("s3://bucket/m/").await.unwrap_err();
        assert!(
            error.is_retryable() && error.to_string().contains("503"),
            "{op:?}: {error}"
        );
        assert_eq!(store.count(op), 5, "{op:?}: {error}");
        node.assert_nothing_published("503 for ever");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let node = Node::new(address);
    let error = node.acquire("s3://bucket/m/").await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_cache_shows_nobody_what_the_store_would_not() {
    let bytes = pattern(4, MIB + 1);
    let object = Object::new(bytes.clone());
    let store = Liar::start(vec![("m/a", object)], |request, _| {
        match request.signer.as_str() {
            "default" => Fault::Serve,
            _ => Fault::Answer(403, "AccessDenied"),
        }
    });
    let node = Node::new(store.address);
    let first = node.acquire("s3://bucket/m/").await.unwrap();
    assert_eq!(
        (first.hit, first.verified),
        (false, Verification::StoreChecksum)
    );
    let served = store.count(Op::Get);
    assert!(node.acquire("s3://bucket/m/").await.unwrap().hit);
    assert_eq!(store.count(Op::Get), served, "a hit downloads nothing");

    let error = node
        .acquire_as("other", "s3://bucket/m/")
        .await
        .unwrap_err();
    assert!(matches!(error, DatasetError::Denied { .. }), "{error}");
    let error = node
        .acquire_as("third", "s3://bucket/m/")
        .await
        .unwrap_err();
    assert!(
        matches!(error, DatasetError::NotAllowed { .. }) && error.is_refusal(),
        "{error}"
    );
}
