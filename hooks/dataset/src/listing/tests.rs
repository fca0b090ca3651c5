use super::*;

fn admit_all(keys: &[&str]) -> Result<Vec<String>, DatasetError> {
    let uri: DatasetUri = "s3://bucket/m/".parse().unwrap();
    let mut listed = Keys::below(&uri, "m/");
    let mut paths = Vec::new();
    for key in keys {
        paths.extend(listed.admit(key, 0)?);
    }
    listed.finish()?;
    Ok(paths)
}

#[test]
fn keys_that_must_not_become_paths() {
    let long = format!("m/{}", "x".repeat(256));
    for (keys, why) in [
        (vec!["m/../../etc/passwd"], "'.' or '..'"),
        (vec!["m/a/./b"], "'.' or '..'"),
        (vec!["m//etc/passwd"], "empty"),
        (vec!["m/a//b"], "empty"),
        (vec!["m/a\nb"], "control"),
        (vec!["m/a\0b"], "control"),
        (vec!["other/a"], "below the prefix"),
        (vec!["/m/a"], "below the prefix"),
        (vec!["m/a", "m/a"], "twice"),
        (vec!["m/a", "m/a/b"], "key of another object"),
        (vec!["m/a/b/c", "m/a"], "key of another object"),
        (vec!["m/"], "nothing below"),
        (vec![], "nothing below"),
        (vec![long.as_str()], "255"),
    ] {
        let refused = admit_all(&keys).expect_err(&format!("{keys:?}"));
        assert!(refused.to_string().contains(why), "{keys:?}: {refused}");
    }
    let uri: DatasetUri = "s3://bucket/m/".parse().unwrap();
    assert!(Keys::below(&uri, "m/").admit("m/a", -1).is_err());
    assert!(Keys::below(&uri, "m/").admit("m/a/", 5).is_err());
}

#[test]
fn plain_keys_and_folder_markers() {
    let paths = admit_all(&["m/", "m/a/", "m/a/b", "m/a.b", "m/a-b/ü", "m/.hidden"]).unwrap();
    assert_eq!(paths, ["a/b", "a.b", "a-b/ü", ".hidden"]);
}

#[cfg(feature = "s3")]
#[test]
fn a_version_names_all_that_was_listed() {
    let uri: DatasetUri = "s3://bucket/m/".parse().unwrap();
    let object = |path: &str, size, etag: &str| Object {
        path: path.to_owned(),
        key: path.to_owned(),
        size,
        etag: etag.to_owned(),
        state: String::new(),
        expected: crate::checksum::Expected::Nothing,
    };
    let version = |objects| Listing::new(&uri, objects).unwrap().version;
    let one = version(vec![object("a", 1, "x"), object("b", 2, "y")]);
    assert_eq!(one, version(vec![object("b", 2, "y"), object("a", 1, "x")]));
    for other in [
        vec![object("a", 1, "x")],
        vec![object("a", 1, "x"), object("b", 3, "y")],
        vec![object("a", 1, "x"), object("b", 2, "z")],
        vec![object("a", 1, "x"), object("c", 2, "y")],
    ] {
        assert_ne!(one, version(other));
    }
    let huge = vec![object("a", u64::MAX, ""), object("b", u64::MAX, "")];
    assert!(Listing::new(&uri, huge).is_err());
}
