//! Memory of the device and of the host, and copies between them.
//!
//! Start at [`Buffer`].

use std::marker::PhantomData;

use half::bf16;

use super::{Argument, Device};
use crate::{Error, api::Address, error::fits};

/// What can lie in device memory.
///
/// # Safety
/// Any bits are a value, and there is no padding.
pub unsafe trait Element: Copy + Default + 'static {
    /// cudaDataType.
    const TYPE: i32;
}
// SAFETY: plain numbers.
unsafe impl Element for bf16 {
    const TYPE: i32 = 14;
}
// SAFETY: plain numbers.
unsafe impl Element for f32 {
    const TYPE: i32 = 0;
}
// SAFETY: plain numbers.
unsafe impl Element for f64 {
    const TYPE: i32 = 1;
}
// SAFETY: plain numbers.
unsafe impl Element for u32 {
    const TYPE: i32 = 12;
}
// SAFETY: plain numbers.
unsafe impl Element for i32 {
    const TYPE: i32 = 10;
}

/// Device memory of `len` elements.
pub struct Buffer<T: Element> {
    device: Device,
    address: Address,
    len: usize,
    _elements: PhantomData<T>,
}

impl<T: Element> Buffer<T> {
    pub(super) fn new(device: &Device, address: Address, len: usize) -> Self {
        Self {
            device: device.clone(),
            address,
            len,
            _elements: PhantomData,
        }
    }

    /// All of it.
    pub fn view(&self) -> View<'_, T> {
        View {
            address: self.address,
            len: self.len,
            _buffer: PhantomData,
        }
    }

    /// What lies in it, once all work before is done.
    ///
    /// # Errors
    /// [`Error::Call`] if something of that failed.
    pub fn read(&self) -> Result<Vec<T>, Error> {
        self.view().read(&self.device)
    }
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        let freed = driver!(self.device.0, cuMemFree_v2(self.address));
        self.device.on_drop(freed);
    }
}

/// A part of a buffer.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T> {
    pub(crate) address: Address,
    pub(crate) len: usize,
    _buffer: PhantomData<&'a T>,
}

impl<'a> View<'a, u32> {
    /// The same words as whole numbers with a sign.
    pub fn as_i32(self) -> View<'a, i32> {
        View {
            address: self.address,
            len: self.len,
            _buffer: PhantomData,
        }
    }

    /// The same words as floats.
    pub fn as_f32(self) -> View<'a, f32> {
        View {
            address: self.address,
            len: self.len,
            _buffer: PhantomData,
        }
    }
}

impl<'a, T: Element> View<'a, T> {
    /// Elements.
    #[expect(clippy::len_without_is_empty, reason = "an empty view has no use")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// `len` elements from `start` on.
    ///
    /// # Errors
    /// [`Error::Shape`] if they reach beyond the view.
    pub fn part(&self, start: usize, len: usize) -> Result<View<'a, T>, Error> {
        let end = start.checked_add(len);
        fits(end.is_some_and(|end| end <= self.len), || {
            format!("elements {start} + {len} of a buffer of {}", self.len)
        })?;
        Ok(View {
            address: self.address + (start * size_of::<T>()) as u64,
            len,
            _buffer: PhantomData,
        })
    }

    /// Copies `values` to its front.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are more.
    pub fn write(&self, device: &Device, values: &[T]) -> Result<(), Error> {
        fits(values.len() <= self.len, || {
            format!("{} values into a buffer of {}", values.len(), self.len)
        })?;
        if values.is_empty() {
            return Ok(());
        }
        driver!(
            device.0,
            cuMemcpyHtoDAsync_v2(
                self.address,
                values.as_ptr().cast(),
                size_of_val(values),
                device.0.stream
            )
        )
    }

    /// What lies in it, once all work before is done.
    ///
    /// # Errors
    /// [`Error::Call`] if something of that failed.
    pub fn read(&self, device: &Device) -> Result<Vec<T>, Error> {
        let mut values = vec![T::default(); self.len];
        if self.len > 0 {
            let bytes = size_of_val(values.as_slice());
            driver!(
                device.0,
                cuMemcpyDtoHAsync_v2(
                    values.as_mut_ptr().cast(),
                    self.address,
                    bytes,
                    device.0.stream
                )
            )?;
        }
        device.synchronize()?;
        Ok(values)
    }

    /// Fills it with zeros.
    ///
    /// # Errors
    /// [`Error::Call`] where the driver refuses.
    pub fn clear(&self, device: &Device) -> Result<(), Error> {
        if self.len == 0 {
            return Ok(());
        }
        driver!(
            device.0,
            cuMemsetD8Async(self.address, 0, self.len * size_of::<T>(), device.0.stream)
        )
    }

    /// Copies another view's elements to its front.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are more.
    pub fn copy_from(&self, device: &Device, from: View<'_, T>) -> Result<(), Error> {
        fits(from.len <= self.len, || {
            format!("{} elements into {}", from.len, self.len)
        })?;
        driver!(
            device.0,
            cuMemcpyDtoDAsync_v2(
                self.address,
                from.address,
                from.len * size_of::<T>(),
                device.0.stream
            )
        )
    }

    pub(crate) fn argument(&self) -> Argument {
        Argument::Pointer(self.address)
    }
}

/// Memory of the host that the device copies by itself. Its owner sees to it that no copy is under way when it is read or written.
pub struct Pinned<T: Element> {
    device: Device,
    address: *mut T,
    len: usize,
}

impl<T: Element> Pinned<T> {
    pub(super) fn new(device: &Device, address: *mut T, len: usize) -> Self {
        Self {
            device: device.clone(),
            address,
            len,
        }
    }

    pub(super) fn address(&self) -> *mut T {
        self.address
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// What lies in it.
    pub fn values(&self) -> &[T] {
        // SAFETY: so many elements were allocated and set to zeros, and any bits are a value.
        unsafe { std::slice::from_raw_parts(self.address, self.len) }
    }

    /// To change what lies in it.
    pub fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed by one.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.len) }
    }
}

impl<T: Element> Drop for Pinned<T> {
    fn drop(&mut self) {
        let freed = driver!(self.device.0, cuMemFreeHost(self.address.cast()));
        self.device.on_drop(freed);
    }
}
