//! The names of a struct's fields, as serde knows them: the configuration's own list of known keys.
//!
//! A deserialiser that reads nothing: the struct's `Deserialize` tells it the names before it asks for a value. Start at [`of`].

use std::fmt;

use serde::{
    Deserializer,
    de::{DeserializeOwned, Error, Visitor},
    forward_to_deserialize_any,
};

/// The field names of `T`; none if `T` is not a struct.
pub(super) fn of<T: DeserializeOwned>() -> &'static [&'static str] {
    match T::deserialize(Asks) {
        Ok(_) => &[],
        Err(Answer(names)) => names,
    }
}

struct Asks;

/// The names, carried out as the error that ends the deserialisation.
#[derive(Debug)]
struct Answer(&'static [&'static str]);

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl std::error::Error for Answer {}

impl Error for Answer {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self(&[])
    }
}

impl<'de> Deserializer<'de> for Asks {
    type Error = Answer;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Answer> {
        Err(Answer(&[]))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Answer> {
        Err(Answer(fields))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
