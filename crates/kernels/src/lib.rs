//! Custom tensor operations of imprint, each beside a plain reference; home of unsafe code.
//!
//! Every operation is row-independent: the result for a token does not depend on how many other tokens
//! are in the call, nor on how a sequence was cut into calls, bit for bit. Inputs are f32 tensors on the
//! CPU. Every file has the formula, the meaning as plain loops (`reference`), the fast path, and the
//! checked function that the other rooms call. Start at [`Linear`], the product with frozen weights.

mod attention;
mod blocks;
mod cores;
mod floats;
mod gemm;
mod linear;
#[cfg(test)]
mod noise;
mod norm;
mod outer;
mod rope;
mod simd;
mod sum;

pub use attention::{AttentionRow, kv_append, paged_attention};
pub use blocks::WeightFormat;
pub use cores::{CoreRows, CoreView, apply_cores};
pub use floats::Floats;
pub use gemm::on_pool;
pub use linear::Linear;
pub use norm::{rms_norm, silu_mul};
pub use outer::accumulate_outer;
pub use rope::rope;
pub use sum::add;
