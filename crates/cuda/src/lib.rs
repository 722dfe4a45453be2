//! The decoder, its adapters and their read-outs on an NVIDIA GPU.
//!
//! Speaks to the driver and to cuBLAS by their C functions, found at run time; kernels are its own (kernels/*.cu) and are embedded under
//! the feature `cuda`. All else is built and tested without it, on a software device that runs the kernels' text (soft/). Holds no
//! sessions and no text. Start at [`Model`], below it [`ops`] and [`Device`].

mod api;
mod batch;
pub mod bench;
pub mod check;
mod device;
mod error;
mod folder;
mod kernel;
mod model;
pub mod ops;
pub mod read_out;
mod shape;
mod slots;
pub mod twin;
mod weights;

pub use batch::{Batch, Capacity, Limits, Rows};
pub use device::{
    Buffer, Description, Device, Element, Event, Graph, Libraries, Pinned, SideStream, View,
};
pub use error::Error;
pub use kernel::Kernel;
pub use model::{Bucket, Memory, Model, Sums, Write, splits_for};
pub use shape::{Form, GeneratorShape, Place, Shape};
pub use slots::Slots;
pub use weights::{Asked, AskedBlocks, Blocks, Files, Source};
