//! Sizes as people write them: `200GiB`, `512MiB`.

/// Why a size was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a size: write a whole number and a unit (B, KiB, MiB, GiB, TiB), such as 200GiB"
)]
pub struct SizeError(pub String);

/// The units with their bytes, largest first.
const UNITS: [(&str, u64); 5] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

/// Reads `200GiB` as bytes. A number without a unit is refused: nobody knows what it means. So is `GB`, which some
/// read as 10⁹ and some as 2³⁰.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let refuse = || SizeError(text.chars().take(40).collect());
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .ok_or_else(refuse)?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| refuse())?;
    let (_, bytes) = UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or_else(refuse)?;
    number.checked_mul(*bytes).ok_or_else(refuse)
}

/// Bytes as [`parse`] reads them back, in the largest unit of which they are a whole number.
pub fn written(bytes: u64) -> String {
    let whole = |(_, unit): &&(&str, u64)| bytes >= *unit && bytes.is_multiple_of(*unit);
    let (name, unit) = UNITS.iter().find(whole).unwrap_or(&("B", 1));
    format!("{}{name}", bytes / unit)
}

/// For `#[serde(deserialize_with = …)]`.
pub(crate) fn deserialize<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> Result<Option<u64>, D::Error> {
    let text: String = serde::Deserialize::deserialize(from)?;
    parse(&text).map(Some).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("0B", 0),
            ("1B", 1),
            ("512MiB", 512 << 20),
            ("200GiB", 200 << 30),
            ("3TiB", 3 << 40),
        ] {
            assert_eq!(parse(text).unwrap(), bytes, "{text}");
            assert_eq!(written(bytes), text);
        }
        for bad in [
            "",
            "5",
            "GiB",
            "5GB",
            "5 GiB",
            "-5GiB",
            "1.5GiB",
            "5gib",
            "99999999999999999999B",
            "16777216TiB",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
