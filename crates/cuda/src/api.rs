//! The functions of the driver and of cuBLAS that are used, found in libraries at run time.
//!
//! Only declarations: what they mean is NVIDIA's manual's matter, how they are used `device.rs`'s. Start at [`Driver`].
#![expect(unsafe_code, reason = "functions of foreign libraries")]
#![expect(non_snake_case, reason = "the libraries' own names")]

use std::{
    ffi::{CStr, c_char, c_int, c_longlong, c_uint, c_void},
    path::Path,
};

use libloading::Library;

use crate::Error;

/// A device address.
pub(crate) type Address = u64;
/// Something of the driver's or of cuBLAS's: a context, stream, event, module, function, graph.
pub(crate) type Handle = *mut c_void;

macro_rules! functions {
    ($(#[$doc:meta])* $name:ident { $($symbol:ident($($argument:ty),*);)* }) => {
        $(#[$doc])*
        pub(crate) struct $name {
            $(pub(crate) $symbol: unsafe extern "C" fn($($argument),*) -> c_int,)*
            /// Keeps the functions where they are.
            _library: Library,
        }

        impl $name {
            pub(crate) fn load(path: &Path) -> Result<Self, Error> {
                let refused = |error: libloading::Error| Error::Library { path: path.to_owned(), detail: error.to_string() };
                // SAFETY: whoever names a library trusts what it does when it is loaded; the default is the machine's own driver.
                let library = unsafe { Library::new(path) }.map_err(refused)?;
                $(
                    // SAFETY: the type is that of the function of this name in cuda.h or cublas_api.h.
                    let $symbol = *unsafe { library.get(stringify!($symbol)) }.map_err(refused)?;
                )*
                Ok(Self { $($symbol,)* _library: library })
            }
        }
    };
}

functions! {
    /// The CUDA driver, as of cuda.h 13; every function here is in drivers since 12.0.
    Driver {
        cuInit(c_uint);
        cuDeviceGet(*mut c_int, c_int);
        cuDeviceGetName(*mut c_char, c_int, c_int);
        cuDeviceTotalMem_v2(*mut usize, c_int);
        cuDeviceGetAttribute(*mut c_int, c_int, c_int);
        cuDevicePrimaryCtxRetain(*mut Handle, c_int);
        cuDevicePrimaryCtxRelease_v2(c_int);
        cuCtxSetCurrent(Handle);
        cuGetErrorString(c_int, *mut *const c_char);
        cuMemAlloc_v2(*mut Address, usize);
        cuMemFree_v2(Address);
        cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
        cuMemFreeHost(*mut c_void);
        cuMemcpyHtoDAsync_v2(Address, *const c_void, usize, Handle);
        cuMemcpyDtoHAsync_v2(*mut c_void, Address, usize, Handle);
        cuMemcpyDtoDAsync_v2(Address, Address, usize, Handle);
        cuMemsetD8Async(Address, u8, usize, Handle);
        cuStreamCreate(*mut Handle, c_uint);
        cuStreamDestroy_v2(Handle);
        cuStreamSynchronize(Handle);
        cuStreamWaitEvent(Handle, Handle, c_uint);
        cuStreamBeginCapture_v2(Handle, c_int);
        cuStreamEndCapture(Handle, *mut Handle);
        cuEventCreate(*mut Handle, c_uint);
        cuEventDestroy_v2(Handle);
        cuEventRecord(Handle, Handle);
        cuEventSynchronize(Handle);
        cuEventElapsedTime(*mut f32, Handle, Handle);
        cuModuleLoadData(*mut Handle, *const c_void);
        cuModuleUnload(Handle);
        cuModuleGetFunction(*mut Handle, Handle, *const c_char);
        cuFuncSetAttribute(Handle, c_int, c_int);
        cuLaunchKernel(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void);
        cuGraphInstantiateWithFlags(*mut Handle, Handle, u64);
        cuGraphUpload(Handle, Handle);
        cuGraphLaunch(Handle, Handle);
        cuGraphExecDestroy(Handle);
        cuGraphDestroy(Handle);
    }
}

functions! {
    /// cuBLAS, as of cublas_api.h 13 (and 12).
    Blas {
        cublasCreate_v2(*mut Handle);
        cublasDestroy_v2(Handle);
        cublasSetStream_v2(Handle, Handle);
        cublasSetWorkspace_v2(Handle, *mut c_void, usize);
        cublasGemmStridedBatchedEx(
            Handle, c_int, c_int, c_int, c_int, c_int, *const c_void,
            *const c_void, c_int, c_int, c_longlong,
            *const c_void, c_int, c_int, c_longlong,
            *const c_void, *mut c_void, c_int, c_int, c_longlong,
            c_int, c_int, c_int
        );
    }
}

/// What the tests' software device has beside a driver's functions.
pub(crate) struct Software {
    violations: unsafe extern "C" fn() -> u64,
    violation: unsafe extern "C" fn(u64) -> *const c_char,
    kinds: unsafe extern "C" fn(*const c_char) -> *const c_char,
    _library: Library,
}

impl Software {
    /// `None` for a real driver.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        // SAFETY: as in `load`; the types are those of soft/device.cpp.
        unsafe {
            let library = Library::new(path).ok()?;
            let violations = *library.get("soft_violations").ok()?;
            let violation = *library.get("soft_violation").ok()?;
            let kinds = *library.get("soft_kinds").ok()?;
            Some(Self {
                violations,
                violation,
                kinds,
                _library: library,
            })
        }
    }

    /// What was done in captures that may not be done there, since the library was loaded.
    pub(crate) fn violations(&self) -> Vec<String> {
        // SAFETY: strings live until the next violation; there is one thread.
        unsafe {
            let count = (self.violations)();
            (0..count).map(|i| text((self.violation)(i))).collect()
        }
    }

    /// Kinds of a kernel's arguments, as the compiler of its text has them.
    pub(crate) fn kinds(&self, kernel: &CStr) -> String {
        // SAFETY: a string of static life.
        unsafe { text((self.kinds)(kernel.as_ptr())) }
    }
}

/// # Safety
/// `text` ends with a zero and lives as long as the call.
unsafe fn text(text: *const c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}
