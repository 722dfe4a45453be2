//! A device: its one stream of work, memory, launches, graphs, and a second stream for copies.
//!
//! Everything runs in order on one non-blocking stream; nothing is allocated once a model is loaded. One thread owns a device. What
//! a kernel does with its operands is its caller's matter: [`crate::ops`] checks shapes before a launch. Start at [`Device::open`].
#![expect(unsafe_code, reason = "calls into the driver")]

/// Calls a function of the driver and checks its result.
macro_rules! driver {
    ($inner:expr, $function:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: the arguments are of the kinds that the function takes; handles are alive as long as their owners here.
        let code = unsafe { ($inner.driver.$function)($($argument),*) };
        $inner.check(stringify!($function), code)
    }};
}

mod memory;
mod stream;

use std::{
    cell::{Cell, RefCell},
    ffi::{CStr, CString, c_void},
    path::{Path, PathBuf},
    rc::Rc,
};

pub use memory::{Buffer, Element, Pinned, View};
pub use stream::{Event, Graph, SideStream};

use crate::{
    Error, Kernel,
    api::{Address, Blas, Driver, Handle, Software},
    kernel::IMAGES,
};

/// Where the driver and cuBLAS are.
#[derive(Clone, Debug)]
pub struct Libraries {
    /// The driver.
    pub driver: PathBuf,
    /// cuBLAS.
    pub cublas: PathBuf,
}

impl Default for Libraries {
    /// The names that the loader knows on a machine with CUDA 13.
    fn default() -> Self {
        Self {
            driver: "libcuda.so.1".into(),
            cublas: "libcublas.so.13".into(),
        }
    }
}

/// A device with its kernels loaded. Cheap to clone; the last clone closes it.
#[derive(Clone)]
pub struct Device(Rc<Inner>);

struct Inner {
    driver: Driver,
    blas: Blas,
    blas_handle: Handle,
    ordinal: i32,
    stream: Handle,
    modules: Vec<Handle>,
    /// By `Kernel as usize`.
    functions: Vec<Handle>,
    /// What cuBLAS may use; its own would be allocated at a bad moment.
    workspace: Cell<Address>,
    launches: Cell<u64>,
    failed_drop: RefCell<Option<Error>>,
    software: Option<Software>,
}

/// A device as one speaks of it.
#[derive(Clone, Debug)]
pub struct Description {
    /// The driver's name of it.
    pub name: String,
    /// Bytes of its memory.
    pub memory: usize,
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Compute capability.
    pub capability: (i32, i32),
}

const NON_BLOCKING: u32 = 1;
const CAPTURE_THREAD_LOCAL: i32 = 1;
const DYNAMIC_SHARED_LIMIT: i32 = 8;
const WORKSPACE: usize = 32 << 20;
/// The most shared memory that a block of a Hopper device may ask for.
pub(crate) const MAX_SHARED: usize = 232_448;

impl Inner {
    fn check(&self, call: &'static str, code: i32) -> Result<(), Error> {
        if code == 0 {
            return Ok(());
        }
        let mut text = std::ptr::null();
        // SAFETY: the driver gives a string of static life, or none.
        let detail = unsafe {
            (self.driver.cuGetErrorString)(code, &raw mut text);
            if text.is_null() {
                String::new()
            } else {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        };
        Err(Error::Call { call, code, detail })
    }
}

impl Device {
    /// Opens a device, loads the kernels and sets up its stream and cuBLAS.
    ///
    /// # Errors
    /// [`Error::Library`] without a driver or cuBLAS, [`Error::NoKernels`] in a program without machine code, [`Error::Call`] where the
    /// driver refuses.
    pub fn open(libraries: &Libraries, ordinal: i32) -> Result<Self, Error> {
        let driver = Driver::load(&libraries.driver)?;
        let software = Software::of(&libraries.driver);
        if !cfg!(feature = "cuda") && software.is_none() {
            return Err(Error::NoKernels);
        }
        let blas = Blas::load(&libraries.cublas)?;
        let null = std::ptr::null_mut;
        let mut inner = Inner {
            driver,
            blas,
            blas_handle: null(),
            ordinal,
            stream: null(),
            modules: Vec::new(),
            functions: Vec::new(),
            workspace: Cell::new(0),
            launches: Cell::new(0),
            failed_drop: RefCell::new(None),
            software,
        };
        let (mut device, mut context) = (0, null());
        driver!(inner, cuInit(0))?;
        driver!(inner, cuDeviceGet(&raw mut device, ordinal))?;
        driver!(inner, cuDevicePrimaryCtxRetain(&raw mut context, device))?;
        driver!(inner, cuCtxSetCurrent(context))?;
        driver!(inner, cuStreamCreate(&raw mut inner.stream, NON_BLOCKING))?;
        for (_, image) in IMAGES {
            let mut module = null();
            driver!(
                inner,
                cuModuleLoadData(&raw mut module, image.as_ptr().cast())
            )?;
            inner.modules.push(module);
        }
        for kernel in Kernel::ALL {
            let mut function = null();
            let name = CString::new(kernel.name()).unwrap_or_default();
            let module = inner.modules[kernel.file()];
            driver!(
                inner,
                cuModuleGetFunction(&raw mut function, module, name.as_ptr())
            )?;
            if kernel.takes_much_shared() {
                driver!(
                    inner,
                    cuFuncSetAttribute(function, DYNAMIC_SHARED_LIMIT, MAX_SHARED as i32 - 1024)
                )?;
            }
            inner.functions.push(function);
        }
        let mut workspace = 0;
        driver!(inner, cuMemAlloc_v2(&raw mut workspace, WORKSPACE))?;
        inner.workspace.set(workspace);
        // SAFETY: as `driver!`; the workspace lives until the handle is destroyed.
        let code = unsafe { (inner.blas.cublasCreate_v2)(&raw mut inner.blas_handle) };
        blas_result("cublasCreate_v2", code)?;
        // SAFETY: as above.
        let code = unsafe { (inner.blas.cublasSetStream_v2)(inner.blas_handle, inner.stream) };
        blas_result("cublasSetStream_v2", code)?;
        // SAFETY: as above.
        let code = unsafe {
            (inner.blas.cublasSetWorkspace_v2)(
                inner.blas_handle,
                workspace as *mut c_void,
                WORKSPACE,
            )
        };
        blas_result("cublasSetWorkspace_v2", code)?;
        Ok(Self(Rc::new(inner)))
    }

    /// What it is.
    ///
    /// # Errors
    /// [`Error::Call`] where the driver refuses.
    pub fn description(&self) -> Result<Description, Error> {
        let inner = &*self.0;
        let (mut name, mut memory) = ([0; 256], 0);
        driver!(
            inner,
            cuDeviceGetName(name.as_mut_ptr(), 255, inner.ordinal)
        )?;
        driver!(inner, cuDeviceTotalMem_v2(&raw mut memory, inner.ordinal))?;
        let attribute = |which| {
            let mut value = 0;
            driver!(
                inner,
                cuDeviceGetAttribute(&raw mut value, which, inner.ordinal)
            )
            .map(|()| value)
        };
        // SAFETY: the buffer's last byte stays 0.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }
            .to_string_lossy()
            .into_owned();
        Ok(Description {
            name,
            memory,
            multiprocessors: usize::try_from(attribute(16)?).unwrap_or(0),
            capability: (attribute(75)?, attribute(76)?),
        })
    }

    /// Memory for `len` elements, as it is.
    ///
    /// # Errors
    /// [`Error::Call`] if there is not enough.
    pub fn alloc<T: Element>(&self, len: usize) -> Result<Buffer<T>, Error> {
        let bytes = len.checked_mul(size_of::<T>());
        let bytes =
            bytes.ok_or_else(|| crate::error::shape("a buffer beyond what can be addressed"))?;
        let mut address = 0;
        driver!(self.0, cuMemAlloc_v2(&raw mut address, bytes.max(16)))?;
        Ok(Buffer::new(self, address, len))
    }

    /// Memory of zeros.
    ///
    /// # Errors
    /// As [`Self::alloc`].
    pub fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<T>, Error> {
        let buffer = self.alloc(len)?;
        buffer.view().clear(self)?;
        Ok(buffer)
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// As [`Self::alloc`].
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<Buffer<T>, Error> {
        let buffer = self.alloc(values.len())?;
        buffer.view().write(self, values)?;
        Ok(buffer)
    }

    /// Memory of the host that the device copies from and to by itself.
    ///
    /// # Errors
    /// [`Error::Call`] if there is not enough.
    pub fn pinned<T: Element>(&self, len: usize) -> Result<Pinned<T>, Error> {
        let bytes = len.checked_mul(size_of::<T>());
        let bytes =
            bytes.ok_or_else(|| crate::error::shape("a buffer beyond what can be addressed"))?;
        let mut address = std::ptr::null_mut();
        driver!(self.0, cuMemHostAlloc(&raw mut address, bytes.max(16), 0))?;
        // SAFETY: so many bytes were allocated.
        unsafe { address.cast::<u8>().write_bytes(0, bytes) };
        Ok(Pinned::new(self, address.cast(), len))
    }

    /// Waits until everything that was asked for is done.
    ///
    /// # Errors
    /// [`Error::Call`] if something of it failed.
    pub fn synchronize(&self) -> Result<(), Error> {
        driver!(self.0, cuStreamSynchronize(self.0.stream))
    }

    /// Launches so far, of kernels and of products.
    pub fn launches(&self) -> u64 {
        self.0.launches.get()
    }

    /// Puts a kernel on the stream. `ops` has checked what the arguments point to.
    pub(crate) fn launch(
        &self,
        kernel: Kernel,
        grid: [usize; 3],
        threads: u32,
        shared: usize,
        arguments: &[Argument],
    ) -> Result<(), Error> {
        debug_assert_eq!(
            arguments.iter().map(Argument::kind).collect::<String>(),
            kernel.kinds(),
            "arguments of {}",
            kernel.name()
        );
        if grid.contains(&0) {
            return Ok(());
        }
        let size = |n: usize| {
            u32::try_from(n).map_err(|_| crate::error::shape(format!("a grid of {n} blocks")))
        };
        let (x, y, z, shared) = (
            size(grid[0])?,
            size(grid[1])?,
            size(grid[2])?,
            size(shared)?,
        );
        let mut values: Vec<u64> = arguments.iter().map(Argument::bits).collect();
        let mut pointers: Vec<*mut c_void> = values
            .iter_mut()
            .map(|value| (&raw mut *value).cast())
            .collect();
        self.0.launches.set(self.0.launches.get() + 1);
        driver!(
            self.0,
            cuLaunchKernel(
                self.0.functions[kernel as usize],
                x,
                y,
                z,
                threads,
                1,
                1,
                shared,
                self.0.stream,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        )
    }

    /// C = alpha op(A) op(B) + beta C of `batch` row-major matrices; [`crate::ops::multiply`] has checked them.
    pub(crate) fn gemm(&self, g: &Gemm) -> Result<(), Error> {
        let (f32s, f64s) = ([g.alpha as f32, g.beta as f32], [g.alpha, g.beta]);
        let wide = g.c.1 == f64::TYPE;
        let (alpha, beta): (*const c_void, *const c_void) = if wide {
            ((&raw const f64s[0]).cast(), (&raw const f64s[1]).cast())
        } else {
            ((&raw const f32s[0]).cast(), (&raw const f32s[1]).cast())
        };
        // CUBLAS_COMPUTE_64F, _32F_FAST_TF32 and _32F.
        let compute = match g.a.1 {
            f64::TYPE => 70,
            f32::TYPE => 77,
            _ => 68,
        };
        self.0.launches.set(self.0.launches.get() + 1);
        // A row-major matrix is the transpose of a column-major one: Cᵀ = op(B)ᵀ op(A)ᵀ.
        // SAFETY: `multiply` checked that the three matrices lie in their buffers; scalars are on the host, as cuBLAS has it by default.
        let code = unsafe {
            (self.0.blas.cublasGemmStridedBatchedEx)(
                self.0.blas_handle,
                i32::from(g.transposed.1),
                i32::from(g.transposed.0),
                g.n,
                g.m,
                g.k,
                alpha,
                g.b.0 as *const c_void,
                g.b.1,
                g.b.2,
                g.b.3,
                g.a.0 as *const c_void,
                g.a.1,
                g.a.2,
                g.a.3,
                beta,
                g.c.0 as *mut c_void,
                g.c.1,
                g.c.2,
                g.c.3,
                g.batch,
                compute,
                -1,
            )
        };
        blas_result("cublasGemmStridedBatchedEx", code)
    }

    /// Records what `work` puts on the stream, as one graph. `work` must have run once before, and may neither allocate nor wait.
    ///
    /// # Errors
    /// What `work` fails with; [`Error::Call`] if it did what cannot be captured.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<Graph, Error> {
        let inner = &*self.0;
        driver!(
            inner,
            cuStreamBeginCapture_v2(inner.stream, CAPTURE_THREAD_LOCAL)
        )?;
        let worked = work();
        let (mut graph, mut executable) = (std::ptr::null_mut(), std::ptr::null_mut());
        let ended = driver!(inner, cuStreamEndCapture(inner.stream, &raw mut graph));
        worked?;
        ended?;
        let instantiated = driver!(
            inner,
            cuGraphInstantiateWithFlags(&raw mut executable, graph, 0)
        );
        driver!(inner, cuGraphDestroy(graph))?;
        instantiated?;
        driver!(inner, cuGraphUpload(executable, inner.stream))?;
        Ok(Graph::new(self, executable))
    }

    /// A stream beside the device's own, for copies.
    ///
    /// # Errors
    /// [`Error::Call`] where the driver refuses.
    pub fn side_stream(&self) -> Result<SideStream, Error> {
        let mut stream = std::ptr::null_mut();
        driver!(self.0, cuStreamCreate(&raw mut stream, NON_BLOCKING))?;
        Ok(SideStream::new(self, stream))
    }

    /// An event; `timed` where [`Event::since`] will be asked.
    ///
    /// # Errors
    /// [`Error::Call`] where the driver refuses.
    pub fn event(&self, timed: bool) -> Result<Event, Error> {
        let mut event = std::ptr::null_mut();
        driver!(
            self.0,
            cuEventCreate(&raw mut event, if timed { 0 } else { 2 })
        )?;
        Ok(Event::new(self, event))
    }

    /// Later work of the device waits for the event.
    ///
    /// # Errors
    /// [`Error::Call`] where the driver refuses.
    pub fn wait_for(&self, event: &Event) -> Result<(), Error> {
        driver!(self.0, cuStreamWaitEvent(self.0.stream, event.handle(), 0))
    }

    /// What could not be given back when its owner went away, if anything.
    pub fn failed_drop(&self) -> Option<Error> {
        self.0.failed_drop.borrow_mut().take()
    }

    /// What a software device saw that may not happen while a stream is captured; a real one refuses it.
    pub fn violations(&self) -> Vec<String> {
        self.0
            .software
            .as_ref()
            .map_or_else(Vec::new, Software::violations)
    }

    /// The kinds of a kernel's arguments as its text has them; only a software device can tell.
    pub fn declared_kinds(&self, kernel: Kernel) -> Option<String> {
        let name = CString::new(kernel.name()).ok()?;
        Some(self.0.software.as_ref()?.kinds(&name))
    }

    fn on_drop(&self, result: Result<(), Error>) {
        if let Err(error) = result {
            *self.0.failed_drop.borrow_mut() = Some(error);
        }
    }
}

impl Kernel {
    fn takes_much_shared(self) -> bool {
        self.name().starts_with("attend_1")
            || self.name().starts_with("attend_6")
            || self == Self::Eigen
    }
}

fn blas_result(call: &'static str, code: i32) -> Result<(), Error> {
    if code == 0 {
        Ok(())
    } else {
        Err(Error::Call {
            call,
            code,
            detail: String::new(),
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Nobody is left to hear of a failure.
        // SAFETY: each handle is destroyed once, those that were never made are null.
        unsafe {
            if !self.blas_handle.is_null() {
                let _ = (self.blas.cublasDestroy_v2)(self.blas_handle);
            }
        }
        if self.workspace.get() != 0 {
            let _ = driver!(self, cuMemFree_v2(self.workspace.get()));
        }
        for module in &self.modules {
            let _ = driver!(self, cuModuleUnload(*module));
        }
        if !self.stream.is_null() {
            let _ = driver!(self, cuStreamDestroy_v2(self.stream));
            let _ = driver!(self, cuDevicePrimaryCtxRelease_v2(self.ordinal));
        }
    }
}

/// One argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Argument {
    Pointer(Address),
    U32(u32),
    U64(u64),
    F32(f32),
    F64(f64),
}

impl Argument {
    fn kind(&self) -> char {
        match self {
            Self::Pointer(_) => 'p',
            Self::U32(_) => 'u',
            Self::U64(_) => 'l',
            Self::F32(_) => 'f',
            Self::F64(_) => 'd',
        }
    }

    /// The value in the first bytes of a word (hosts of CUDA are little-endian).
    fn bits(&self) -> u64 {
        match *self {
            Self::Pointer(value) | Self::U64(value) => value,
            Self::U32(value) => u64::from(value),
            Self::F32(value) => u64::from(value.to_bits()),
            Self::F64(value) => value.to_bits(),
        }
    }
}

/// A product of matrices: (address, type, leading dimension, stride) of each.
pub(crate) struct Gemm {
    pub(crate) transposed: (bool, bool),
    pub(crate) m: i32,
    pub(crate) n: i32,
    pub(crate) k: i32,
    pub(crate) alpha: f64,
    pub(crate) beta: f64,
    pub(crate) a: (Address, i32, i32, i64),
    pub(crate) b: (Address, i32, i32, i64),
    pub(crate) c: (Address, i32, i32, i64),
    pub(crate) batch: i32,
}

/// A library that is asked for by its path.
impl From<&Path> for Libraries {
    /// Driver and cuBLAS in one, as the tests' software device has it.
    fn from(path: &Path) -> Self {
        Self {
            driver: path.to_owned(),
            cublas: path.to_owned(),
        }
    }
}
