//! Custom tensor operations of imprint, each beside a plain reference; home of unsafe code.
//!
//! Every operation is row-independent: the result for a token does not depend on how many other tokens
//! are in the call, nor on how a sequence was cut into calls, bit for bit. Inputs are f32 tensors on the
//! CPU; where candle's autograd tracks an input, an operation brings its gradient. What training asks is answered for other tensors,
//! too, on a device or of another type, by candle's own operations (`plain`). Every file has the formula, the meaning as plain loops (`reference`), the fast path, and the
//! checked function that the other rooms call. Start at [`Linear`], the product with frozen weights.

mod attention;
mod blocks;
mod cores;
mod floats;
mod gemm;
#[cfg(test)]
mod gradients;
mod linear;
#[cfg(test)]
mod noise;
mod norm;
mod outer;
mod plain;
mod recorded;
mod ridge;
mod rope;
mod score;
mod simd;
mod sum;
mod trained;

pub use attention::{AttentionRow, kv_append, paged_attention, self_attention};
pub use blocks::WeightFormat;
pub use cores::{CoreRows, CoreView, apply_cores};
pub use floats::Floats;
pub use gemm::on_pool;
pub use linear::Linear;
pub use norm::{rms_norm, silu_mul};
pub use outer::accumulate_outer;
pub use recorded::{recorded1, recorded2, recorded3};
pub use ridge::ridge;
pub use rope::rope;
pub use score::{Likeliest, Says, Scores, Teacher, likeliest, score};
pub use sum::{add, add_bias};
pub use trained::{apply_trained_cores, gram_sums, linear_trained, outer_sums};
