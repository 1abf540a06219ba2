//! The NVIDIA driver and the CUDA half of libtorch, opened at run time: the program is linked against neither, so that it
//! starts on machines without them. What is opened stays open.

use std::error::Error;
use std::ffi::{CStr, c_char, c_int, c_uint};
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library as Opened, RTLD_GLOBAL, RTLD_NOW};

/// A shared library that is never closed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Library(&'static Opened);

impl Library {
    /// Opens a library for the whole process; what the loader says if it cannot.
    pub(crate) fn open(name: &str) -> Result<Self, String> {
        // SAFETY: the libraries opened here are the driver's and CUDA's, whose initialisers may run at any time.
        let opened = unsafe { Opened::open(Some(name), RTLD_NOW | RTLD_GLOBAL) };
        // What the loader says is the source of the crate's own words.
        opened.map(Self::kept).map_err(|error| error.source().map_or_else(|| error.to_string(), ToString::to_string))
    }

    /// All that the process has opened for everyone.
    pub(crate) fn every() -> Self {
        Self::kept(Opened::this())
    }

    fn kept(opened: Opened) -> Self {
        Self(Box::leak(Box::new(opened)))
    }

    /// A function by its name.
    ///
    /// # Safety
    /// `F` is the type of that function, a pointer.
    pub(crate) unsafe fn function<F: Copy>(self, name: &CStr) -> Option<F> {
        // SAFETY: what was found has the type that the caller vouches for, and the library stays open.
        unsafe { self.0.get::<F>(name.to_bytes_with_nul()) }.ok().map(|found| *found)
    }
}

/// What the driver says of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Driver {
    /// The newest CUDA it serves: 13000 is 13.0.
    pub version: u32,
    /// The first GPU, or the driver's error code where it gives none.
    pub gpu: Result<DriverGpu, i32>,
}

/// The first GPU as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverGpu {
    /// Its name on the market.
    pub name: String,
    /// Compute capability: major, minor.
    pub capability: (u32, u32),
    /// Its memory.
    pub total_bytes: u64,
    /// Its multiprocessors.
    pub n_multiprocessors: u32,
}

/// The driver's code for "no GPU here".
pub const NO_GPU: i32 = 100;
/// What stands for a driver without the functions that are asked for.
pub const NOT_A_DRIVER: i32 = -1;

const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
const MULTIPROCESSORS: c_int = 16;

/// Asks the driver; `None` where there is none.
pub fn driver() -> Option<Driver> {
    let library = Library::open("libcuda.so.1").ok()?;
    let mut version = 0;
    // SAFETY: the types are those of the driver's C interface.
    let get_version = unsafe { library.function::<unsafe extern "C" fn(*mut c_int) -> c_int>(c"cuDriverGetVersion") };
    if let Some(get_version) = get_version {
        // SAFETY: it writes one number.
        unsafe { get_version(&mut version) };
    }
    Some(Driver { version: u32::try_from(version).unwrap_or(0), gpu: first_gpu(library) })
}

fn first_gpu(library: Library) -> Result<DriverGpu, i32> {
    let done = |code: c_int| if code == 0 { Ok(()) } else { Err(code) };
    let (mut device, mut total_bytes, mut name) = (0, 0usize, [0 as c_char; 256]);
    // SAFETY: the types are those of the driver's C interface; the outputs have the sizes it is told.
    unsafe {
        let init: unsafe extern "C" fn(c_uint) -> c_int = library.function(c"cuInit").ok_or(NOT_A_DRIVER)?;
        let get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int =
            library.function(c"cuDeviceGet").ok_or(NOT_A_DRIVER)?;
        let get_name: unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int =
            library.function(c"cuDeviceGetName").ok_or(NOT_A_DRIVER)?;
        let get_total: unsafe extern "C" fn(*mut usize, c_int) -> c_int =
            library.function(c"cuDeviceTotalMem_v2").ok_or(NOT_A_DRIVER)?;
        let get_attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int =
            library.function(c"cuDeviceGetAttribute").ok_or(NOT_A_DRIVER)?;
        done(init(0))?;
        done(get(&mut device, 0))?;
        let attribute = |which: c_int| {
            let mut value = 0;
            done(get_attribute(&mut value, which, device)).map(|()| u32::try_from(value).unwrap_or(0))
        };
        done(get_name(name.as_mut_ptr(), name.len() as c_int, device))?;
        done(get_total(&mut total_bytes, device))?;
        Ok(DriverGpu {
            name: CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned(),
            capability: (attribute(CAPABILITY_MAJOR)?, attribute(CAPABILITY_MINOR)?),
            total_bytes: total_bytes as u64,
            n_multiprocessors: attribute(MULTIPROCESSORS)?,
        })
    }
}

/// Opens the CUDA half of libtorch; what the loader says if it cannot. Its operations are then known to the dispatcher,
/// so it comes before the first use of libtorch.
pub fn open_libtorch_cuda() -> Result<(), String> {
    Library::open("libtorch_cuda.so").map(|_| ())
}

/// The CUDA that libtorch was built for: 13000 is 13.0. The library that knows comes with libtorch's.
pub fn runtime_version() -> Option<u32> {
    let mut version = 0;
    // SAFETY: the type is that of the CUDA runtime's C interface; it writes one number.
    let code = unsafe {
        let get: unsafe extern "C" fn(*mut c_int) -> c_int = Library::every().function(c"cudaRuntimeGetVersion")?;
        get(&mut version)
    };
    u32::try_from(version).ok().filter(|_| code == 0)
}

/// The version of NVRTC, CUDA's compiler at run time, where it is there for a CUDA version: (13, 0).
///
/// It looks its built-in functions up by a bare name, which our own paths do not reach: they are opened first.
pub fn nvrtc(runtime: u32) -> Option<(i32, i32)> {
    let (major, minor) = (runtime / 1000, runtime % 1000 / 10);
    let open = |name: String| -> Option<Library> {
        // By the loader's own paths, else beside libtorch, where Python packages have it.
        let beside = libtorch_dir().into_iter().flat_map(|dir| {
            let folders = [format!("cu{major}"), "cuda_nvrtc".to_string()];
            folders.map(|folder| dir.join("../../nvidia").join(folder).join("lib").join(&name).display().to_string())
        });
        std::iter::once(name.clone()).chain(beside).find_map(|path| Library::open(&path).ok())
    };
    open(format!("libnvrtc-builtins.so.{major}.{minor}"))?;
    let library = open(format!("libnvrtc.so.{major}"))?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the type is that of NVRTC's C interface; it writes two numbers.
    let code = unsafe {
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = library.function(c"nvrtcVersion")?;
        version(&mut major, &mut minor)
    };
    (code == 0).then_some((major, minor))
}

/// The folder that libtorch was loaded from.
fn libtorch_dir() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path =
        maps.lines().find_map(|line| Some(&line[line.find('/')?..]).filter(|p| p.ends_with("/libtorch_cpu.so")))?;
    Path::new(path).parent().map(Path::to_path_buf)
}
