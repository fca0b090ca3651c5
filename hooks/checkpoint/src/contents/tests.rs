use std::{fs, io::Write as _};

use super::*;
use crate::{
    Facts, ImageStore,
    chunks::Compression,
    criu_image::{
        PE_LAZY, PE_PRESENT, SocketKind,
        tests::{
            folder, pagemap,
            records::{Number, Text, image, message},
        },
    },
};

const PAGE: u64 = 4096;

/// `mm-<pid>.img`: start, end, object, status.
fn mm(areas: &[(u64, u64, u64, u64)]) -> Vec<u8> {
    let areas: Vec<_> = areas
        .iter()
        .map(|(start, end, object, status)| {
            message(&[
                (1, Number(*start)),
                (2, Number(*end)),
                (4, Number(*object)),
                (7, Number(*status)),
            ])
        })
        .collect();
    let mut fields: Vec<_> = areas.iter().map(|area| (14, Text(area))).collect();
    // Where the stack begins: near the end of its mapping.
    fields.push((5, Number(0x7fff_0fff)));
    image(0x5749_2820, &[message(&fields)])
}

fn files() -> Vec<u8> {
    let library = message(&[(1, Number(5)), (6, Text(b"/lib/libc.so.6"))]);
    let port = |number: u64, state: u64, words: [u64; 2]| {
        message(&[
            (3, Number(2)),
            (4, Number(1)),
            (5, Number(6)),
            (6, Number(state)),
            (7, Number(number)),
            (8, Number(if state == 1 { 4000 } else { 0 })),
            (11, Number(words[0])),
            (12, Number(words[1])),
        ])
    };
    let any = port(8000, 10, [0, 0]);
    let loopback = u64::from(u32::from_ne_bytes([127, 0, 0, 1]));
    let connected = port(8001, 1, [loopback, loopback]);
    let unix = message(&[(4, Number(10)), (11, Text(b"\0name"))]);
    let of = |id: u64, field: u8, bytes: &[u8]| message(&[(2, Number(id)), (field, Text(bytes))]);
    let entries = [
        of(5, 3, &library),
        of(6, 4, &any),
        of(7, 4, &connected),
        of(8, 16, &unix),
        of(9, 7, &[]),
    ];
    image(0x5630_3138, &entries)
}

/// An image with a heap of `heap` and a changed page of a library, in process 1.
fn made(store: &ImageStore, heap: &[u8]) -> Arc<Chunks> {
    let pages = heap.len() as u64 / PAGE;
    let (namespace, name) = ("a".parse().unwrap(), "x".parse().unwrap());
    let request = store.begin(&namespace, &name, Default::default()).unwrap();
    let order = store.partial_at(&request.dir()).unwrap().unwrap();
    let partial = order.begin(None, Compression::None, Path::new("")).unwrap();
    let criu = partial.criu_dir();
    folder(&criu);
    fs::remove_file(criu.join("pages-1.img")).unwrap();
    let flags = PE_PRESENT | PE_LAZY;
    // The last page of the heap, and the library, are one run.
    let map = pagemap(1, &[(0x10_0000, pages + 1, flags), (0x7fff_0000, 1, flags)]);
    fs::write(criu.join("pagemap-1.img"), map).unwrap();
    let end = 0x10_0000 + pages * PAGE;
    let areas = [
        (0x10_0000, end, 0, 1 | 1 << 5 | 1 << 9),
        (end, end + 4 * PAGE, 5, 1 | 1 << 6),
        (0x7ffe_0000, 0x7fff_1000, 0, 1 | 1 << 9),
        (end + 8 * PAGE, end + 9 * PAGE, 0, 1 << 16),
    ];
    fs::write(criu.join("mm-1.img"), mm(&areas)).unwrap();
    fs::write(criu.join("files.img"), files()).unwrap();
    let mut stream = partial.chunks().stream("criu/pages-1.img");
    stream.write_all(heap).unwrap();
    stream.write_all(&[9; PAGE as usize]).unwrap();
    stream.write_all(&[8; PAGE as usize]).unwrap();
    stream.finish().unwrap();
    let image = partial.seal(Facts::default()).unwrap();
    Arc::new(image.chunks(None).unwrap())
}

#[test]
fn memory_is_told_by_what_it_is_for_and_what_another_image_has() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    // Four chunks: two that stay, one of zeros, and one that changes.
    let mut heap: Vec<u8> = (0..65_536_u32).flat_map(u32::to_le_bytes).collect();
    heap[2 << 16..3 << 16].fill(0);
    let first = made(&store, &heap);
    heap[3 << 16] ^= 1;
    let second = made(&store, &heap);
    let common = second.common(&first);
    let (namespace, name) = ("a".parse().unwrap(), "x".parse().unwrap());
    let image = store.resolve(&namespace, &name, None).unwrap();
    let into = root.path().join("into");
    let found = image.contents(&into, None, &second, Some(&common)).unwrap();
    assert!(!into.exists());
    let of = |kind, name: Option<&str>| Memory {
        pid: Some(1),
        kind,
        name: name.map(str::to_owned),
    };
    let memory: Vec<_> = found.memory.into_iter().collect();
    let heap = Composition {
        bytes: 4 << 16,
        zeros: 1 << 16,
        common: 2 << 16,
    };
    let library = Composition {
        bytes: PAGE,
        zeros: 0,
        common: PAGE,
    };
    assert_eq!(
        memory,
        [
            (of(AreaKind::Heap, None), heap),
            (of(AreaKind::Stack, None), library),
            (of(AreaKind::File, Some("/lib/libc.so.6")), library)
        ]
    );
    assert_eq!(heap.own(), 1 << 16);
    assert_eq!(second.in_common(&common), (3, (2 << 16) + 2 * PAGE));
    let socket = |kind, state, local: Option<&str>, peer: Option<&str>| Socket {
        kind,
        state,
        local: local.map(str::to_owned),
        peer: peer.map(str::to_owned),
    };
    let connected = Some("connected");
    let listening = Some("listening");
    assert_eq!(
        found.sockets,
        [
            socket(
                SocketKind::Tcp,
                connected,
                Some("127.0.0.1:8001"),
                Some("127.0.0.1:4000")
            ),
            socket(SocketKind::Tcp, listening, Some("0.0.0.0:8000"), None),
            socket(SocketKind::Unix, listening, Some("@name"), None),
            socket(SocketKind::Netlink, None, None, None),
        ]
    );
}

#[test]
fn hostile_mappings_are_refused() {
    let root = tempfile::tempdir().unwrap();
    for (areas, words) in [
        (
            &[(0x1000, 0x3000, 0, 1), (0x2000, 0x4000, 0, 1)][..],
            "overlap",
        ),
        (&[(0x3000, 0x1000, 0, 1)], "ends before it begins"),
    ] {
        fs::write(root.path().join("mm-1.img"), mm(areas)).unwrap();
        let refused = crate::criu_image::areas(root.path(), 1).unwrap_err();
        assert!(refused.to_string().contains(words), "{refused}");
    }
}
