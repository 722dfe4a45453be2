//! What comes between pieces of work: graphs, events, and a stream for copies.

use super::{Device, Element, Pinned, View};
use crate::{Error, api::Handle, error::fits};

/// Work that was recorded: one launch does all of it again, with what then lies in its buffers.
pub struct Graph {
    device: Device,
    executable: Handle,
}

impl Graph {
    pub(super) fn new(device: &Device, executable: Handle) -> Self {
        Self {
            device: device.clone(),
            executable,
        }
    }

    /// Puts all of it on the stream.
    ///
    /// # Errors
    /// [`Error::Call`] where the driver refuses.
    pub fn launch(&self) -> Result<(), Error> {
        driver!(
            self.device.0,
            cuGraphLaunch(self.executable, self.device.0.stream)
        )
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let freed = driver!(self.device.0, cuGraphExecDestroy(self.executable));
        self.device.on_drop(freed);
    }
}

/// A stream beside the device's own.
pub struct SideStream {
    device: Device,
    stream: Handle,
}

impl SideStream {
    pub(super) fn new(device: &Device, stream: Handle) -> Self {
        Self {
            device: device.clone(),
            stream,
        }
    }

    /// Copies to the front of `to`, later. `from` must stay as it is until that is done.
    ///
    /// # Errors
    /// [`Error::Shape`] if it does not fit.
    pub fn copy_in<T: Element>(&self, to: View<'_, T>, from: &Pinned<T>) -> Result<(), Error> {
        fits(from.len() <= to.len(), || {
            format!("{} elements into {}", from.len(), to.len())
        })?;
        driver!(
            self.device.0,
            cuMemcpyHtoDAsync_v2(
                to.address,
                from.address().cast(),
                from.len() * size_of::<T>(),
                self.stream
            )
        )
    }

    /// Copies to the front of `to`, later. `to` must not be read until that is done.
    ///
    /// # Errors
    /// [`Error::Shape`] if it does not fit.
    pub fn copy_out<T: Element>(&self, to: &mut Pinned<T>, from: View<'_, T>) -> Result<(), Error> {
        fits(from.len() <= to.len(), || {
            format!("{} elements into {}", from.len(), to.len())
        })?;
        driver!(
            self.device.0,
            cuMemcpyDtoHAsync_v2(
                to.address().cast(),
                from.address,
                from.len() * size_of::<T>(),
                self.stream
            )
        )
    }

    /// Later work of this stream waits for the event.
    ///
    /// # Errors
    /// [`Error::Call`] where the driver refuses.
    pub fn wait_for(&self, event: &Event) -> Result<(), Error> {
        driver!(
            self.device.0,
            cuStreamWaitEvent(self.stream, event.event, 0)
        )
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        let freed = driver!(self.device.0, cuStreamDestroy_v2(self.stream));
        self.device.on_drop(freed);
    }
}

/// A point in a stream.
pub struct Event {
    device: Device,
    event: Handle,
}

impl Event {
    pub(super) fn new(device: &Device, event: Handle) -> Self {
        Self {
            device: device.clone(),
            event,
        }
    }

    pub(super) fn handle(&self) -> Handle {
        self.event
    }

    /// Is reached when all work of the device so far is done.
    ///
    /// # Errors
    /// [`Error::Call`] where the driver refuses.
    pub fn record(&self) -> Result<(), Error> {
        driver!(
            self.device.0,
            cuEventRecord(self.event, self.device.0.stream)
        )
    }

    /// Is reached when all work of that stream so far is done.
    ///
    /// # Errors
    /// [`Error::Call`] where the driver refuses.
    pub fn record_on(&self, stream: &SideStream) -> Result<(), Error> {
        driver!(self.device.0, cuEventRecord(self.event, stream.stream))
    }

    /// Waits until it is reached.
    ///
    /// # Errors
    /// [`Error::Call`] if work before it failed.
    pub fn synchronize(&self) -> Result<(), Error> {
        driver!(self.device.0, cuEventSynchronize(self.event))
    }

    /// Milliseconds from another event to this one; both were waited for.
    ///
    /// # Errors
    /// [`Error::Call`] if one was not reached.
    pub fn since(&self, earlier: &Self) -> Result<f32, Error> {
        let mut ms = 0.0;
        driver!(
            self.device.0,
            cuEventElapsedTime(&raw mut ms, earlier.event, self.event)
        )?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let freed = driver!(self.device.0, cuEventDestroy_v2(self.event));
        self.device.on_drop(freed);
    }
}
