//! The GGUF container: header, metadata and where the tensors lie.
//!
//! Reads the header once and checks all of it against the file's length, so that a cut or lying file is
//! an error here and never an allocation or a panic later. Knows no model: keys and tensor names are
//! their readers' matter (`weights`, `text`). Start at [`Gguf::open`]. Format: the GGUF specification in
//! ggml's `docs/gguf.md`, versions 2 and 3, little-endian.

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use crate::files::FileError;

/// No string of a model file is longer: the longest known are chat templates of some 20 kB.
const MAX_STRING_BYTES: u64 = 1 << 24;
const MAX_DIMENSIONS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// An array of one type; arrays of arrays are not read (no model file has them).
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
}

/// Where a tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorInfo {
    /// Sizes, the fastest-running first: a matrix [out, in] has `[in, out]`.
    pub(crate) shape: Vec<u64>,
    /// ggml's number of the format; see [`ggml_type`].
    pub(crate) ggml_type: u32,
    /// Offset of its first byte in the file.
    pub(crate) offset: u64,
    /// Its length; 0 for formats whose block size we do not know.
    pub(crate) bytes: u64,
}

/// Names, elements a block and bytes a block of ggml's formats.
pub(crate) fn ggml_type(number: u32) -> Option<(&'static str, u64, u64)> {
    Some(match number {
        0 => ("F32", 1, 4),
        1 => ("F16", 1, 2),
        2 => ("Q4_0", 32, 18),
        3 => ("Q4_1", 32, 20),
        6 => ("Q5_0", 32, 22),
        7 => ("Q5_1", 32, 24),
        8 => ("Q8_0", 32, 34),
        9 => ("Q8_1", 32, 36),
        10 => ("Q2_K", 256, 84),
        11 => ("Q3_K", 256, 110),
        12 => ("Q4_K", 256, 144),
        13 => ("Q5_K", 256, 176),
        14 => ("Q6_K", 256, 210),
        15 => ("Q8_K", 256, 292),
        30 => ("BF16", 1, 2),
        _ => return None,
    })
}

/// A GGUF file whose header has been read and checked.
#[derive(Debug)]
pub(crate) struct Gguf {
    path: PathBuf,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorInfo>,
}

impl Gguf {
    /// Reads and checks the header of the file.
    pub(crate) fn open(path: &Path) -> Result<Self, FileError> {
        let file = File::open(path).map_err(|e| FileError::io(path, e))?;
        let length = file.metadata().map_err(|e| FileError::io(path, e))?.len();
        let mut input = Input {
            path,
            inner: BufReader::with_capacity(1 << 16, file),
            position: 0,
            length,
        };
        read_header(&mut input)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    #[cfg(test)]
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    pub(crate) fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Names of all tensors, in no order.
    #[cfg(test)]
    pub(crate) fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A string, if the key is there; another type under the key is an error. So do all the following.
    pub(crate) fn string(&self, key: &str) -> Result<Option<&str>, FileError> {
        self.typed(key, "a string", |value| match value {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>, FileError> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// An integer of any width that is not negative.
    pub(crate) fn u64(&self, key: &str) -> Result<Option<u64>, FileError> {
        self.typed(key, "a whole number", |value| match value {
            Value::U8(n) => Some(u64::from(*n)),
            Value::U16(n) => Some(u64::from(*n)),
            Value::U32(n) => Some(u64::from(*n)),
            Value::U64(n) => Some(*n),
            Value::I8(n) => u64::try_from(*n).ok(),
            Value::I16(n) => u64::try_from(*n).ok(),
            Value::I32(n) => u64::try_from(*n).ok(),
            Value::I64(n) => u64::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A float of either width.
    pub(crate) fn f64(&self, key: &str) -> Result<Option<f64>, FileError> {
        self.typed(key, "a float", |value| match value {
            Value::F32(x) => Some(f64::from(*x)),
            Value::F64(x) => Some(*x),
            _ => None,
        })
    }

    pub(crate) fn strings(&self, key: &str) -> Result<Option<&[String]>, FileError> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(items)) => Some(items.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn f32s(&self, key: &str) -> Result<Option<&[f32]>, FileError> {
        self.typed(key, "an array of f32", |value| match value {
            Value::Array(Array::F32(items)) => Some(items.as_slice()),
            _ => None,
        })
    }

    /// Integers of at most 32 bits.
    pub(crate) fn i64s(&self, key: &str) -> Result<Option<Vec<i64>>, FileError> {
        self.typed(key, "an array of integers", |value| {
            let Value::Array(array) = value else {
                return None;
            };
            Some(match array {
                Array::U8(items) => items.iter().map(|&n| n.into()).collect(),
                Array::I8(items) => items.iter().map(|&n| n.into()).collect(),
                Array::U16(items) => items.iter().map(|&n| n.into()).collect(),
                Array::I16(items) => items.iter().map(|&n| n.into()).collect(),
                Array::U32(items) => items.iter().map(|&n| n.into()).collect(),
                Array::I32(items) => items.iter().map(|&n| n.into()).collect(),
                Array::I64(items) => items.clone(),
                _ => return None,
            })
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        kind: &str,
        take: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, FileError> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        match take(value) {
            Some(taken) => Ok(Some(taken)),
            None => Err(FileError::header(
                &self.path,
                format!("{key} is not {kind}"),
            )),
        }
    }

    /// The bytes of a tensor, read from `file` (this file, opened once by the caller).
    pub(crate) fn read_tensor(
        &self,
        file: &mut File,
        info: &TensorInfo,
    ) -> Result<Vec<u8>, FileError> {
        let bytes = usize::try_from(info.bytes)
            .map_err(|_| FileError::header(&self.path, "a tensor larger than the address space"))?;
        let mut data = vec![0; bytes];
        file.seek(SeekFrom::Start(info.offset))
            .map_err(|e| FileError::io(&self.path, e))?;
        file.read_exact(&mut data)
            .map_err(|e| FileError::io(&self.path, e))?;
        Ok(data)
    }
}

fn read_header(input: &mut Input<'_, impl Read>) -> Result<Gguf, FileError> {
    if &input.array::<4>()? != b"GGUF" {
        return Err(input.damaged("it does not begin with GGUF"));
    }
    let version = input.u32()?;
    if !(2..=3).contains(&version) {
        return Err(FileError::unsupported(
            input.path,
            format!("GGUF version {version} (2 and 3 are)"),
        ));
    }
    let tensor_count = input.u64()?;
    let metadata_count = input.u64()?;

    // A key takes at least 8 + 4 + 1 bytes, a tensor 8 + 4 + 8 + 4 + 8: counts that cannot fit are lies.
    input.check_count(metadata_count, 13, "metadata keys")?;
    let mut metadata = HashMap::new();
    for _ in 0..metadata_count {
        let key = input.string()?;
        let value = read_value(input, &key)?;
        if metadata.contains_key(&key) {
            return Err(input.damaged(format!("the key {key} comes twice")));
        }
        metadata.insert(key, value);
    }

    input.check_count(tensor_count, 32, "tensors")?;
    let mut tensors = HashMap::new();
    for _ in 0..tensor_count {
        let name = input.string()?;
        let info = read_tensor_info(input, &name)?;
        if tensors.contains_key(&name) {
            return Err(input.damaged(format!("the tensor {name} comes twice")));
        }
        tensors.insert(name, info);
    }

    let mut gguf = Gguf {
        path: input.path.to_owned(),
        metadata,
        tensors,
    };
    let alignment = gguf.u64("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(input.damaged(format!("general.alignment is {alignment}")));
    }
    place_tensors(input, &mut gguf.tensors, alignment)?;
    Ok(gguf)
}

/// Turns offsets from the data's start into offsets in the file; all tensors lie inside it, side by side.
fn place_tensors(
    input: &Input<'_, impl Read>,
    tensors: &mut HashMap<String, TensorInfo>,
    alignment: u64,
) -> Result<(), FileError> {
    let start = input.position.next_multiple_of(alignment);
    let mut total: u64 = 0;
    for (name, info) in tensors.iter_mut() {
        if !info.offset.is_multiple_of(alignment) {
            return Err(input.damaged(format!(
                "{name} lies at {}, not a multiple of {alignment}",
                info.offset
            )));
        }
        let end = start
            .checked_add(info.offset)
            .and_then(|at| at.checked_add(info.bytes));
        if end.is_none_or(|end| end > input.length) {
            let (offset, bytes, length) = (info.offset, info.bytes, input.length);
            return Err(input.damaged(format!(
                "{name} (offset {offset}, {bytes} bytes) ends behind the file's {length} bytes"
            )));
        }
        info.offset += start;
        total = total.saturating_add(info.bytes);
    }
    if total > input.length {
        return Err(input.damaged("its tensors overlap"));
    }
    Ok(())
}

fn read_tensor_info(input: &mut Input<'_, impl Read>, name: &str) -> Result<TensorInfo, FileError> {
    let dimensions = input.u32()?;
    if dimensions > MAX_DIMENSIONS {
        return Err(input.damaged(format!("{name} has {dimensions} dimensions")));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        shape.push(input.u64()?);
    }
    let number = input.u32()?;
    let offset = input.u64()?;
    let bytes = match ggml_type(number) {
        None => 0,
        Some((format, block, block_bytes)) => {
            let row = shape.first().copied().unwrap_or(1);
            if !row.is_multiple_of(block) {
                return Err(input.damaged(format!(
                    "{name} has rows of {row}, not a multiple of {format}'s {block}"
                )));
            }
            let elements = shape
                .iter()
                .try_fold(1_u64, |product, &size| product.checked_mul(size));
            elements
                .and_then(|n| (n / block).checked_mul(block_bytes))
                .ok_or_else(|| input.damaged(format!("{name} has an impossible shape {shape:?}")))?
        }
    };
    Ok(TensorInfo {
        shape,
        ggml_type: number,
        offset,
        bytes,
    })
}

fn read_value(input: &mut Input<'_, impl Read>, key: &str) -> Result<Value, FileError> {
    let kind = input.u32()?;
    Ok(match kind {
        0 => Value::U8(u8::from_le_bytes(input.array()?)),
        1 => Value::I8(i8::from_le_bytes(input.array()?)),
        2 => Value::U16(u16::from_le_bytes(input.array()?)),
        3 => Value::I16(i16::from_le_bytes(input.array()?)),
        4 => Value::U32(input.u32()?),
        5 => Value::I32(i32::from_le_bytes(input.array()?)),
        6 => Value::F32(f32::from_le_bytes(input.array()?)),
        7 => Value::Bool(input.bool()?),
        8 => Value::String(input.string()?),
        9 => Value::Array(read_array(input, key)?),
        10 => Value::U64(input.u64()?),
        11 => Value::I64(i64::from_le_bytes(input.array()?)),
        12 => Value::F64(f64::from_le_bytes(input.array()?)),
        other => return Err(input.damaged(format!("{key} has the unknown value type {other}"))),
    })
}

fn read_array(input: &mut Input<'_, impl Read>, key: &str) -> Result<Array, FileError> {
    let kind = input.u32()?;
    let count = input.u64()?;
    Ok(match kind {
        0 => Array::U8(input.many(count, 1, |i| Ok(u8::from_le_bytes(i.array()?)))?),
        1 => Array::I8(input.many(count, 1, |i| Ok(i8::from_le_bytes(i.array()?)))?),
        2 => Array::U16(input.many(count, 2, |i| Ok(u16::from_le_bytes(i.array()?)))?),
        3 => Array::I16(input.many(count, 2, |i| Ok(i16::from_le_bytes(i.array()?)))?),
        4 => Array::U32(input.many(count, 4, |i| i.u32())?),
        5 => Array::I32(input.many(count, 4, |i| Ok(i32::from_le_bytes(i.array()?)))?),
        6 => Array::F32(input.many(count, 4, |i| Ok(f32::from_le_bytes(i.array()?)))?),
        7 => Array::Bool(input.many(count, 1, Input::bool)?),
        8 => Array::String(input.many(count, 8, Input::string)?),
        10 => Array::U64(input.many(count, 8, |i| i.u64())?),
        11 => Array::I64(input.many(count, 8, |i| Ok(i64::from_le_bytes(i.array()?)))?),
        12 => Array::F64(input.many(count, 8, |i| Ok(f64::from_le_bytes(i.array()?)))?),
        other => {
            return Err(input.damaged(format!("{key} is an array of the unknown type {other}")));
        }
    })
}

/// The header's bytes, never read past the file's length.
struct Input<'a, R> {
    path: &'a Path,
    inner: R,
    position: u64,
    length: u64,
}

impl<R: Read> Input<'_, R> {
    fn damaged(&self, what: impl Into<String>) -> FileError {
        let what: String = what.into();
        FileError::header(self.path, format!("{what} (at byte {})", self.position))
    }

    /// Fails if `count` things of at least `bytes` each cannot follow.
    fn check_count(&self, count: u64, bytes: u64, of: &str) -> Result<(), FileError> {
        let room = self.length.saturating_sub(self.position);
        if count.checked_mul(bytes).is_none_or(|need| need > room) {
            return Err(self.damaged(format!(
                "{count} {of} do not fit into the {room} bytes left"
            )));
        }
        Ok(())
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), FileError> {
        self.check_count(buffer.len() as u64, 1, "bytes")?;
        self.inner
            .read_exact(buffer)
            .map_err(|e| FileError::io(self.path, e))?;
        self.position += buffer.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FileError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, FileError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, FileError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn bool(&mut self) -> Result<bool, FileError> {
        match self.array::<1>()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.damaged(format!("a boolean of {other}"))),
        }
    }

    fn string(&mut self) -> Result<String, FileError> {
        let bytes = self.u64()?;
        if bytes > MAX_STRING_BYTES {
            return Err(self.damaged(format!("a string of {bytes} bytes")));
        }
        self.check_count(bytes, 1, "bytes of a string")?;
        let mut buffer = vec![0; bytes as usize];
        self.fill(&mut buffer)?;
        String::from_utf8(buffer).map_err(|_| self.damaged("a string that is not UTF-8"))
    }

    fn many<T>(
        &mut self,
        count: u64,
        bytes: u64,
        read: impl Fn(&mut Self) -> Result<T, FileError>,
    ) -> Result<Vec<T>, FileError> {
        self.check_count(count, bytes, "array items")?;
        let mut items = Vec::with_capacity(count as usize);
        for _ in 0..count {
            items.push(read(self)?);
        }
        Ok(items)
    }
}
