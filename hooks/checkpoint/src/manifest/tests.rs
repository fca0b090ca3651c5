use super::*;

fn sample() -> Manifest {
    let file = |path: &str| FileEntry {
        path: path.to_owned(),
        size: 1,
        blake3: Digest([7; 32]),
    };
    Manifest {
        format: FORMAT,
        namespace: "team-a".parse().unwrap(),
        name: "warm".parse().unwrap(),
        request: "r".to_owned(),
        created: 1,
        facts: Facts::default(),
        compression: Compression::Lz4,
        encryption: Some(Encryption {
            key: "team-a".to_owned(),
            check: "00".to_owned(),
        }),
        stored: Stored::default(),
        packs: vec![PackEntry {
            id: "0123456789abcdef0123456789abcdef".parse().unwrap(),
            size: 5,
        }],
        files: vec![file("chunks.index"), file("criu/core-1.img")],
    }
}

fn parse(text: &str) -> Result<Manifest, String> {
    Manifest::parse(Path::new("manifest.json"), text.as_bytes()).map_err(|e| e.to_string())
}

#[test]
fn what_is_written_is_read() {
    let text = serde_json::to_string(&sample()).unwrap();
    assert_eq!(parse(&text).unwrap(), sample());
    assert_eq!(sample().file("chunks.index").unwrap().size, 1);
    assert!(sample().file("shm.tar").is_none());
}

#[test]
fn another_format_is_refused_by_its_number_whatever_it_looks_like() {
    let refused = parse(r#"{"format": 9, "files": "in a database", "new": true}"#).unwrap_err();
    assert!(
        refused.contains("format 9") && refused.contains("format 2"),
        "{refused}"
    );
}

#[test]
fn what_is_no_manifest_is_refused() {
    let text = serde_json::to_string(&sample()).unwrap();
    for bad in [
        String::new(),
        "[]".to_owned(),
        text[..text.len() - 1].to_owned(),
        text.replace("\"created\":1", "\"created\":1,\"more\":1"),
        text.replace("\"name\":\"warm\"", "\"name\":\"../warm\""),
        text.replace("\"size\":1", "\"size\":-1"),
    ] {
        assert!(parse(&bad).unwrap_err().contains("damaged"), "{bad}");
    }
}

#[test]
fn a_file_outside_the_image_is_refused() {
    for bad in [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../x",
        "criu/../x",
        "criu/",
        "criu/.",
        "criu/a/b",
        "a/b",
        ".hidden",
        "criu/.hidden",
        "a b",
        "a\\n",
        "manifest.json",
        "manifest.blake3",
        "upper.tar",
        "criu",
        "\\u0000",
        &"a".repeat(256),
    ] {
        let text = serde_json::to_string(&sample())
            .unwrap()
            .replace("chunks.index", bad);
        let refused = parse(&text).unwrap_err();
        assert!(refused.contains("plain name"), "{bad}: {refused}");
    }
    let twice = serde_json::to_string(&sample())
        .unwrap()
        .replace("criu/core-1.img", "chunks.index");
    assert!(parse(&twice).unwrap_err().contains("once"));
}

#[test]
fn too_many_of_anything_are_refused() {
    let mut many = sample();
    many.facts.processes = vec![Process::default(); MAX_ITEMS + 1];
    let refused = parse(&serde_json::to_string(&many).unwrap()).unwrap_err();
    assert!(refused.contains("32769 processes"), "{refused}");
}

#[test]
fn seventeen_mebibytes_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("manifest.json");
    std::fs::write(&path, vec![b' '; 17 << 20]).unwrap();
    let refused = read_bounded(&path, &mut File::open(&path).unwrap()).unwrap_err();
    assert!(matches!(refused, ManifestError::TooLarge { size, .. } if size == 17 << 20));
    // A file that says it is small and is not, as those of /proc.
    let mut endless = File::open("/dev/zero").unwrap();
    assert!(matches!(
        read_bounded(&path, &mut endless),
        Err(ManifestError::TooLarge { .. })
    ));
}
