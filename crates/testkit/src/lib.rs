//! What the tests of several rooms share: files, tiny models, numbers and strategies.
//!
//! A dev-dependency only, and of no other room: it writes models as files and computes with plain
//! loops, so that what is tested never tests itself. Start at [`tiny_base`] and [`smollm2_gguf`].

mod numbers;
mod paths;
mod software;
mod strategies;
mod tiny;

pub use numbers::{
    Random, matmul, relative_error, relative_error_of, solve, tensor, transpose, values,
};
pub use paths::{associative_dir, golden_dir, golden_part, report, repository_root, smollm2_gguf};
pub use software::{cublas, software_device};
pub use strategies::{cut, cut_text, cuts, text};
pub use tiny::{
    Form, GeneratorSpec, TINY_TOKENIZER_VOCAB, TinySpec, tiny_base, tiny_generator, tiny_tokenizer,
};
