//! Compiles the C++ shim over libtorch and tells the program where its libraries lie.

use std::path::PathBuf;

const SHIM: [&str; 5] =
    ["src/torch/shim.cpp", "src/torch/number.cpp", "src/torch/heap.cpp", "src/torch/device.cpp", "src/torch/trace.cpp"];
/// Folders of CUDA's libraries beside torch in the whole set; where they are missing the loader passes them over.
const CUDA_LIBRARIES: [&str; 5] =
    ["nvidia/cu13/lib", "nvidia/cudnn/lib", "nvidia/cusparselt/lib", "nvidia/nccl/lib", "nvidia/nvshmem/lib"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for file in SHIM.into_iter().chain(["src/torch/cpu_rows.h", "src/torch/shim.h"]) {
        println!("cargo:rerun-if-changed={file}");
    }
    let link_dir =
        PathBuf::from(std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys is a direct dependency and sets it"));
    // The link folder holds symbolic links to the CPU half of libtorch; the run-time path is where they lead.
    let cpu_lib = std::fs::canonicalize(link_dir.join("libtorch_cpu.so"))
        .expect("libtorch is missing: run scripts/setup.sh first");
    let torch_lib = cpu_lib.parent().expect("a file lies in a folder").to_path_buf();
    let torch = torch_lib.parent().expect("torch/lib lies in torch").to_path_buf();
    let include = torch.join("include");

    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .files(SHIM)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .opt_level(3)
        .flag("-fopenmp")
        .flag("-w")
        .compile("bellora_shim");

    println!("cargo:rustc-link-search=native={}", torch_lib.display());
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
    println!("cargo:rustc-link-lib=dylib=c10");
    let site = torch.parent().expect("torch lies in a folder of packages");
    for dir in std::iter::once(torch_lib).chain(CUDA_LIBRARIES.iter().map(|dir| site.join(dir))) {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", dir.display());
    }
    // A copy that travels: libraries beside the program.
    println!("cargo:rustc-link-arg-bins=-Wl,-rpath,$ORIGIN/lib");
}
