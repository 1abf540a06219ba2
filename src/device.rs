//! The GPU of this machine: whether it can be used, and if not, exactly what is missing.

use std::fmt;
use std::sync::OnceLock;

use crate::torch::driver::{self, Driver, DriverGpu, NO_GPU};

/// Compute capability from which bf16 has products.
pub const BF16_CAPABILITY: (u32, u32) = (8, 0);

/// A GPU that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its name on the market.
    pub name: String,
    /// Compute capability: major, minor.
    pub capability: (u32, u32),
    /// Its memory.
    pub total_bytes: u64,
    /// Its multiprocessors.
    pub n_multiprocessors: u32,
    /// The newest CUDA that the driver serves: 13000 is 13.0.
    pub driver: u32,
    /// The CUDA that libtorch is built for.
    pub runtime: u32,
    /// The version of CUDA's compiler at run time, where it is there.
    pub nvrtc: Option<(i32, i32)>,
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, capability: (major, minor), total_bytes, driver, runtime, nvrtc, .. } = self;
        let gib = *total_bytes as f64 / f64::from(1 << 30);
        write!(f, "{name} (compute capability {major}.{minor}, {gib:.1} GiB; ")?;
        write!(f, "CUDA {} of the driver, {} of libtorch; ", version(*driver), version(*runtime))?;
        match nvrtc {
            Some((major, minor)) => write!(f, "NVRTC {major}.{minor})"),
            None => write!(f, "no NVRTC)"),
        }
    }
}

/// Whether CUDA can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cuda {
    /// By this GPU, the first one.
    Usable(Gpu),
    /// Not at all.
    Missing {
        /// What is missing.
        what: String,
        /// What to install or set.
        hint: String,
    },
}

/// What was found on a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The NVIDIA driver, if there is one.
    pub driver: Option<Driver>,
    /// Whether the CUDA half of libtorch could be opened, or what the loader said.
    pub libtorch: Result<(), String>,
    /// The CUDA that libtorch is built for.
    pub runtime: Option<u32>,
    /// GPUs that libtorch sees.
    pub n_seen: i64,
    /// The version of CUDA's compiler at run time.
    pub nvrtc: Option<(i32, i32)>,
}

impl Facts {
    /// Looks at this machine. What would not be used is not opened.
    fn gather() -> Self {
        let mut facts = Self { driver: driver::driver(), libtorch: Ok(()), runtime: None, n_seen: 0, nvrtc: None };
        if facts.driver.as_ref().is_none_or(|driver| driver.gpu.is_err()) {
            return facts;
        }
        facts.libtorch = driver::open_libtorch_cuda();
        if facts.libtorch.is_ok() {
            facts.runtime = driver::runtime_version();
            facts.n_seen = tch::Cuda::device_count();
            facts.nvrtc = facts.runtime.and_then(driver::nvrtc);
        }
        facts
    }
}

fn found() -> &'static (Facts, Cuda) {
    static FOUND: OnceLock<(Facts, Cuda)> = OnceLock::new();
    FOUND.get_or_init(|| {
        let facts = Facts::gather();
        let cuda = judge(&facts);
        (facts, cuda)
    })
}

/// Whether CUDA can be used here. The first call opens the driver and libtorch's CUDA half, and so comes before the first
/// use of libtorch.
pub fn cuda() -> &'static Cuda {
    &found().1
}

/// Whether there is an NVIDIA driver, so that a GPU that cannot be used is worth a word.
pub fn has_driver() -> bool {
    found().0.driver.is_some()
}

/// How many GPUs this process can use.
pub fn n_gpus() -> usize {
    match cuda() {
        Cuda::Usable(_) => usize::try_from(found().0.n_seen).unwrap_or_default(),
        Cuda::Missing { .. } => 0,
    }
}

/// The GPU's compute capability; (0, 0) without one.
pub fn capability() -> (u32, u32) {
    match cuda() {
        Cuda::Usable(gpu) => gpu.capability,
        Cuda::Missing { .. } => (0, 0),
    }
}

/// The builds of libtorch 2.11 and the compute capabilities that each has code for.
struct Build {
    /// The CUDA versions it is made with.
    runtimes: std::ops::RangeInclusive<u32>,
    /// Least and largest capability.
    capabilities: std::ops::RangeInclusive<(u32, u32)>,
}

const BUILDS: [Build; 2] = [
    Build { runtimes: 12_000..=12_079, capabilities: (5, 0)..=(9, u32::MAX) },
    Build { runtimes: 12_080..=u32::MAX, capabilities: (7, 5)..=(u32::MAX, u32::MAX) },
];

/// The way to the build for GPUs that are older than what the default build serves.
const OLDER_BUILD: &str = "the cu126 build of libtorch 2.11 serves it: install torch 2.11.0 from pip's cu126 index into a Python \
                           environment, and set LD_LIBRARY_PATH=<site-packages>/torch/lib";
/// The way to the default build.
const DEFAULT_BUILD: &str = "run scripts/setup.sh on this machine, or set LD_LIBRARY_PATH=<site-packages>/torch/lib of a Python \
                             environment with a CUDA build of torch 2.11";

/// Decides from what was found; a function of its argument alone.
pub fn judge(facts: &Facts) -> Cuda {
    let missing = |what: String, hint: &str| Cuda::Missing { what, hint: hint.to_string() };
    let Some(driver) = &facts.driver else {
        return missing(
            "there is no NVIDIA driver (libcuda.so.1)".into(),
            "on a machine with an NVIDIA GPU, install its driver",
        );
    };
    let gpu = match &driver.gpu {
        Ok(gpu) => gpu,
        Err(NO_GPU) => {
            return missing(
                format!("the NVIDIA driver (CUDA {}) finds no GPU", version(driver.version)),
                "nvidia-smi lists the GPUs; CUDA_VISIBLE_DEVICES, or a container started without its GPUs, hides them",
            );
        }
        Err(code) => {
            return missing(
                format!("the NVIDIA driver (CUDA {}) does not start: error {code}", version(driver.version)),
                "see what nvidia-smi says; after an update of the driver, restart the machine",
            );
        }
    };
    let fitting = if gpu.capability < *BUILDS[1].capabilities.start() { OLDER_BUILD } else { DEFAULT_BUILD };
    let whose = |what: &str| format!("{what} for the {}", shown(gpu));
    if let Err(said) = &facts.libtorch {
        return missing(whose(&format!("there is no CUDA half of libtorch (libtorch_cuda.so: {said})")), fitting);
    }
    let Some(runtime) = facts.runtime else {
        return missing(whose("libtorch's CUDA half came without the CUDA runtime (libcudart)"), fitting);
    };
    // Within a major version the driver may be older than the runtime.
    if driver.version / 1000 < runtime / 1000 {
        let (serves, wants) = (version(driver.version), version(runtime));
        let what = format!("the driver serves CUDA {serves}, and libtorch is built for CUDA {wants}");
        return missing(
            whose(&what),
            "install a newer NVIDIA driver, or use a build of libtorch 2.11 for an older CUDA: cu126 needs one \
             that serves CUDA 12.0, and LD_LIBRARY_PATH=<site-packages>/torch/lib points at it",
        );
    }
    let has_code = |build: &Build| build.capabilities.contains(&gpu.capability);
    if !BUILDS.iter().any(|build| build.runtimes.contains(&runtime) && has_code(build)) {
        let what = whose(&format!("libtorch as it is built for CUDA {} has no code", version(runtime)));
        let hint = match BUILDS.iter().position(has_code) {
            Some(0) => OLDER_BUILD,
            Some(_) => DEFAULT_BUILD,
            None => "no build of libtorch 2.11 serves it: compute on the CPU",
        };
        return missing(what, hint);
    }
    if facts.n_seen < 1 {
        return missing(
            whose("libtorch finds no use"),
            "see what nvidia-smi says; a GPU in exclusive mode serves one process",
        );
    }
    let DriverGpu { name, capability, total_bytes, n_multiprocessors } = gpu.clone();
    Cuda::Usable(Gpu {
        name,
        capability,
        total_bytes,
        n_multiprocessors,
        driver: driver.version,
        runtime,
        nvrtc: facts.nvrtc,
    })
}

/// `NVIDIA ... (compute capability 9.0)`.
fn shown(gpu: &DriverGpu) -> String {
    let (major, minor) = gpu.capability;
    format!("{} (compute capability {major}.{minor})", gpu.name)
}

/// 12080 as 12.8.
fn version(cuda: u32) -> String {
    format!("{}.{}", cuda / 1000, cuda % 1000 / 10)
}
