//! Protobuf's wire format, as much as pagemaps need: the scalar fields of one flat message.

/// One field.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field<'a> {
    pub(crate) number: u64,
    /// The value of a varint field; none for the other wire types.
    pub(crate) value: Option<u64>,
    /// The bytes of a text or message; empty for the other wire types.
    pub(crate) bytes: &'a [u8],
}

/// Calls `each` with every field of `message` and with the offset and length of its value in there.
pub(crate) fn fields<'a>(
    message: &'a [u8],
    mut each: impl FnMut(Field<'a>, (usize, usize)),
) -> Result<(), &'static str> {
    const CUT: &str = "a message ends inside a field";
    let mut at = 0;
    while at < message.len() {
        let key = varint(message, &mut at).ok_or(CUT)?;
        let begin = at;
        let mut value = None;
        let mut bytes: &[u8] = &[];
        match key & 7 {
            0 => value = Some(varint(message, &mut at).ok_or(CUT)?),
            1 => at = at.checked_add(8).ok_or(CUT)?,
            2 => {
                let length = varint(message, &mut at).ok_or(CUT)?;
                let length = usize::try_from(length).map_err(|_| CUT)?;
                let end = at.checked_add(length).ok_or(CUT)?;
                bytes = message.get(at..end).ok_or(CUT)?;
                at = end;
            }
            5 => at = at.checked_add(4).ok_or(CUT)?,
            _ => return Err("a message has a field of a type that does not exist"),
        }
        if at > message.len() {
            return Err(CUT);
        }
        let number = key >> 3;
        let field = Field {
            number,
            value,
            bytes,
        };
        each(field, (begin, at - begin));
    }
    Ok(())
}

/// A base-128 number: at most ten bytes, the last of which may hold one bit.
fn varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..70).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            return None;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
