//! The device room: what is said where CUDA cannot be used, memory as the system counts it, operations that a libtorch
//! lacks, the dropout masks of devices without a kernel, `train.deterministic`, and the choices of the set-up script.

use std::path::Path;
use std::process::{Command, Stdio};

use bellora::config::{Config, Meaning};
use bellora::device::{Cuda, Facts, Gpu, judge};
use bellora::error::Error;
use bellora::ops::dropout::{self, DropoutKey, RowOrigin};
use bellora::torch::MaskDraw;
use bellora::torch::cuda::{self, Qkv, addmm_fp32_};
use bellora::torch::driver::{Driver, DriverGpu, NO_GPU};
use bellora::torch::memory;
use tch::{Device, Kind, Tensor};

use crate::support::{Lab, Shape, target_of};

/// A machine where everything is in place: an H100 under CUDA 13.
fn h100() -> Facts {
    let gpu = DriverGpu {
        name: "NVIDIA H100 80GB HBM3".into(),
        capability: (9, 0),
        total_bytes: 85_000_000_000,
        n_multiprocessors: 132,
    };
    Facts {
        driver: Some(Driver { version: 13_000, gpu: Ok(gpu) }),
        libtorch: Ok(()),
        runtime: Some(13_000),
        n_seen: 1,
        nvrtc: Some((13, 0)),
    }
}

/// The same with another GPU.
fn with_gpu(name: &str, capability: (u32, u32)) -> Facts {
    let mut facts = h100();
    if let Some(Driver { gpu: Ok(gpu), .. }) = &mut facts.driver {
        (gpu.name, gpu.capability) = (name.into(), capability);
    }
    facts
}

#[test]
fn a_gpu_with_everything_in_place_is_usable() {
    let Cuda::Usable(gpu) = judge(&h100()) else { panic!("everything is there") };
    assert_eq!((gpu.capability, gpu.driver, gpu.runtime, gpu.n_multiprocessors), ((9, 0), 13_000, 13_000, 132));
    let shown = "NVIDIA H100 80GB HBM3 (compute capability 9.0, 79.2 GiB; CUDA 13.0 of the driver, 13.0 of libtorch; NVRTC 13.0)";
    assert_eq!(gpu.to_string(), shown);
    let without = Gpu { nvrtc: None, driver: 12_080, ..gpu };
    assert!(without.to_string().ends_with("CUDA 12.8 of the driver, 13.0 of libtorch; no NVRTC)"), "{without}");
    // The oldest that CUDA 13 serves, the newest there are, and older ones under a CUDA 12.6 build.
    for (capability, runtime) in
        [((7, 5), 13_000), ((12, 1), 13_000), ((8, 9), 12_080), ((7, 0), 12_060), ((5, 0), 12_060), ((9, 0), 12_060)]
    {
        let facts = Facts { runtime: Some(runtime), ..with_gpu("a GPU", capability) };
        assert!(matches!(judge(&facts), Cuda::Usable(_)), "{capability:?} under {runtime}: {:?}", judge(&facts));
    }
    // Within a major version the driver may be older than the runtime.
    let mut facts = Facts { runtime: Some(12_080), ..h100() };
    facts.driver.as_mut().unwrap().version = 12_020;
    assert!(matches!(judge(&facts), Cuda::Usable(_)));
}

#[test]
fn what_is_missing_is_named_with_the_way_to_it() {
    let v100 = || with_gpu("Tesla V100-SXM2-32GB", (7, 0));
    let driver_without_gpu = |code: i32| Facts { driver: Some(Driver { version: 12_080, gpu: Err(code) }), ..h100() };
    let mut old_driver = h100();
    old_driver.driver.as_mut().unwrap().version = 12_080;
    let lean = || Err("libcublas.so.13: cannot open shared object file".to_string());
    for (facts, what, hint) in [
        (Facts { driver: None, ..h100() }, "there is no NVIDIA driver (libcuda.so.1)", "install its driver"),
        (driver_without_gpu(NO_GPU), "the NVIDIA driver (CUDA 12.8) finds no GPU", "CUDA_VISIBLE_DEVICES"),
        (driver_without_gpu(803), "the NVIDIA driver (CUDA 12.8) does not start: error 803", "nvidia-smi"),
        (
            Facts { libtorch: lean(), ..h100() },
            "there is no CUDA half of libtorch (libtorch_cuda.so: libcublas.so.13: cannot open shared object file) for the \
             NVIDIA H100 80GB HBM3 (compute capability 9.0)",
            "run scripts/setup.sh on this machine, or set LD_LIBRARY_PATH=<site-packages>/torch/lib",
        ),
        (
            Facts { libtorch: lean(), ..v100() },
            "there is no CUDA half of libtorch",
            "the cu126 build of libtorch 2.11 serves it",
        ),
        (Facts { runtime: None, ..h100() }, "came without the CUDA runtime (libcudart)", "scripts/setup.sh"),
        (
            old_driver,
            "the driver serves CUDA 12.8, and libtorch is built for CUDA 13.0",
            "install a newer NVIDIA driver",
        ),
        (
            v100(),
            "libtorch as it is built for CUDA 13.0 has no code for the Tesla V100-SXM2-32GB (compute capability 7.0)",
            "the cu126 build of libtorch 2.11 serves it: install torch 2.11.0 from pip's cu126 index",
        ),
        (Facts { runtime: Some(12_080), ..v100() }, "built for CUDA 12.8 has no code for the Tesla V100", "cu126"),
        (
            Facts { runtime: Some(12_060), ..with_gpu("NVIDIA B200", (10, 0)) },
            "built for CUDA 12.6 has no code for the NVIDIA B200 (compute capability 10.0)",
            "run scripts/setup.sh on this machine",
        ),
        (with_gpu("Tesla K80", (3, 7)), "has no code for the Tesla K80", "no build of libtorch 2.11 serves it"),
        (Facts { n_seen: 0, ..h100() }, "libtorch finds no use for the NVIDIA H100", "exclusive mode"),
    ] {
        match judge(&facts) {
            Cuda::Missing { what: found, hint: way } => {
                assert!(found.contains(what), "expected {what:?}, found {found:?}");
                assert!(way.contains(hint), "expected {hint:?}, found {way:?}");
            }
            Cuda::Usable(gpu) => panic!("expected {what:?}, found a usable {gpu}"),
        }
    }
}

/// Whether this machine has a GPU that can be used; then what is said of a machine without one cannot be tested.
fn has_cuda() -> bool {
    matches!(bellora::device::cuda(), Cuda::Usable(_))
}

#[test]
fn cuda_that_is_asked_for_and_not_there_ends_with_exit_code_2() {
    if has_cuda() {
        println!("left out: this machine has a GPU");
        return;
    }
    let lab = Lab::new(Shape::default());
    let ran = lab.run("check", &[], &["model.device=cuda"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    let Cuda::Missing { what, hint } = bellora::device::cuda() else { panic!("there is no GPU") };
    let said = format!("error: model.device: \"cuda\" is asked for, but {what}\n  hint: {hint}; or write device");
    assert!(ran.stderr.contains(&said), "{}", ran.stderr);
    // Auto takes the CPU and fp32.
    let output = lab.command("check", &[], &["model.device=auto", "model.dtype=auto"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("fp32 on cpu"), "{text}");
}

/// A driver of CUDA 12.8 with one GPU of compute capability 7.0, or with none.
const STAND_IN_DRIVER: &str = r#"
#include <cstdlib>
#include <cstring>
extern "C" {
int cuDriverGetVersion(int* version) { *version = 12080; return 0; }
int cuInit(unsigned) { return std::getenv("NO_GPU") ? 100 : 0; }
int cuDeviceGet(int* device, int index) { *device = 7 + index; return 0; }
int cuDeviceGetName(char* name, int size, int device) { std::strncpy(name, device == 7 ? "Stand-in GPU" : "?", size); return 0; }
int cuDeviceTotalMem_v2(std::size_t* bytes, int) { *bytes = 34359738368; return 0; }
int cuDeviceGetAttribute(int* value, int which, int device) {
  *value = device != 7 ? -1 : which == 75 ? 7 : which == 76 ? 0 : which == 16 ? 80 : -1;
  return 0;
}
}
"#;

#[test]
fn a_driver_is_asked_and_a_gpu_that_cannot_be_used_is_worth_a_word() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("driver.cpp");
    std::fs::write(&source, STAND_IN_DRIVER).unwrap();
    let compiled =
        Command::new("c++").args(["-shared", "-fPIC", "-o"]).arg(dir.path().join("libcuda.so.1")).arg(&source).output();
    let compiled = compiled.unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let lab = Lab::new(Shape::default());
    let check = |set: &str, no_gpu: Option<&str>| {
        let mut process = lab.command("check", &[], &[set]);
        process.env("LD_LIBRARY_PATH", dir.path()).envs(no_gpu.map(|value| ("NO_GPU", value)));
        let output = process.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    // Whatever libtorch is here, its CUDA half is of no use with such a driver.
    let (code, _, said) = check("model.device=cuda", None);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("error: model.device: \"cuda\" is asked for, but "), "{said}");
    assert!(said.contains("for the Stand-in GPU (compute capability 7.0)"), "{said}");
    assert!(said.contains("cu126"), "{said}");
    let (code, printed, said) = check("model.device=auto", None);
    assert_eq!(code, Some(0), "{said}");
    let line = printed.lines().find(|line| line.starts_with("device ")).unwrap_or_default();
    assert!(line.starts_with("device      cpu, not cuda: "), "{printed}");
    assert!(line.contains("for the Stand-in GPU (compute capability 7.0); the cu126 build"), "{line}");
    let (_, printed, _) = check("model.device=auto", Some("1"));
    assert!(printed.contains("cpu, not cuda: the NVIDIA driver (CUDA 12.8) finds no GPU; "), "{printed}");
    // Who asks for the CPU is not bothered.
    assert!(!check("model.device=cpu", None).1.contains("\ndevice "));
}

#[test]
fn operations_of_the_cuda_half_are_named_where_they_are_lacking() {
    let half = |shape: &[i64]| Tensor::ones(shape, (Kind::Half, Device::Cpu));
    let cu_seqlens = Tensor::from_slice(&[0i32, 4]);
    let (x_nhe, x_1nhe) = (half(&[4, 2, 8]), half(&[1, 4, 2, 8]));
    let inputs = |x| Qkv { q: x, k: x, v: x, cu_seqlens: &cu_seqlens, longest: 4 };
    let lse = Tensor::ones([2, 4], (Kind::Float, Device::Cpu));
    let out = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
    for (op, error) in [
        ("_flash_attention_forward", cuda::flash_forward(inputs(&x_nhe)).map(|_| ())),
        ("_flash_attention_backward", cuda::flash_backward(&x_nhe, inputs(&x_nhe), &x_nhe, &lse).map(|_| ())),
        ("_efficient_attention_forward", cuda::efficient_forward(inputs(&x_1nhe)).map(|_| ())),
        (
            "_efficient_attention_backward",
            cuda::efficient_backward(&x_1nhe, inputs(&x_1nhe), &x_1nhe, &lse).map(|_| ()),
        ),
        ("addmm.dtype_out", addmm_fp32_(&out, &half(&[2, 3]), &half(&[3, 2]))),
    ] {
        let Err(Error::Failed(fault)) = error else { panic!("{op}: {error:?}") };
        assert_eq!(fault.place, format!("libtorch's {op}"));
        assert!(fault.what.contains("is not in the libtorch that is loaded"), "{fault}");
        assert!(fault.hint.contains("scripts/setup.sh"), "{}", fault.hint);
    }
    if !has_cuda() {
        let error = memory::synchronize(Device::Cuda(0)).unwrap_err();
        assert!(!error.is_out_of_memory(), "{error}");
        assert!(memory::in_use_bytes(Device::Cuda(0)).is_err());
    }
}

#[test]
fn memory_of_a_cpu_is_the_process_s_resident_memory() {
    const CPU: Device = Device::Cpu;
    const SIZE: u64 = 1 << 30;
    // Other tests allocate and free meanwhile, but less than half of this.
    let before = memory::in_use_bytes(CPU).unwrap();
    let filled = Tensor::ones([SIZE as i64], (Kind::Uint8, CPU));
    let with = memory::in_use_bytes(CPU).unwrap();
    assert!(with > before + SIZE / 2, "{before} {with}");
    assert!(memory::peak_bytes(CPU).unwrap() > before + SIZE / 2);
    drop(filled);
    memory::release_cached(CPU).unwrap();
    memory::synchronize(CPU).unwrap();
    assert!(memory::in_use_bytes(CPU).unwrap() < before + SIZE / 2);
    assert!(memory::peak_bytes(CPU).unwrap() > before + SIZE / 2, "the peak stays");
    memory::reset_peak(CPU).unwrap();
    let peak = memory::peak_bytes(CPU).unwrap();
    assert!(peak < before + SIZE / 2, "{before} {peak}");
    assert!(memory::free_bytes(CPU).unwrap() > 0);
}

#[test]
fn memory_that_ran_out_is_told_from_other_errors() {
    for (what, is_out) in [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB", true),
        ("CUDA error: out of memory", true),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", true),
        ("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried", true),
        ("CUDA error: an illegal memory access was encountered", false),
    ] {
        assert_eq!(Error::Torch(what.into()).is_out_of_memory(), is_out, "{what}");
    }
    assert!(!Error::failed("memory", "out of memory").is_out_of_memory(), "only libtorch says so");
    // What libtorch really says on a CPU.
    let error = Tensor::f_empty([1 << 50], (Kind::Float, Device::Cpu)).map(|_| ()).map_err(Error::from).unwrap_err();
    assert!(error.is_out_of_memory(), "{error}");
}

/// Sites, slots and tokens beyond 16 and 32 bits too, and rows of a length that is no multiple of a call's eight channels.
#[test]
fn plain_dropout_is_the_cpu_kernel_bit_for_bit() {
    let slots = Tensor::from_slice(&[0i64, 5, 5, 63, 70_000, 0xffff_ffff]);
    let tokens = Tensor::from_slice(&[0i64, 0, 1, 511, 65_536, 1 << 20]);
    let origin = RowOrigin { slot_n: slots, token_n: tokens };
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double] {
        for (p, seed, step, site) in
            [(0.05, 42, 0, 0), (0.3, 0x1234_5678_9abc_def0, 41, 6), (0.999, u64::MAX, u32::MAX, 127)]
        {
            tch::manual_seed(1);
            let wide = Tensor::randn([6, 230], (Kind::Float, Device::Cpu)).to_kind(kind);
            // Rows that lie apart.
            let x = wide.narrow(1, 3, 203);
            let ours = dropout::apply(target_of(&x), &x, DropoutKey { p, seed, step }, site, &origin).unwrap();
            let draw = MaskDraw { seed, step, site, drop_below: (p * 65536.0).round() as u32 };
            let plain = dropout::plain_apply(&x, &origin, draw).unwrap();
            assert_eq!((plain.kind(), plain.is_contiguous()), (kind, true));
            assert!(
                ours.equal(&plain),
                "{kind:?} p {p}: {} differ",
                ours.ne_tensor(&plain).sum(Kind::Int64).int64_value(&[])
            );
            let dropped = plain.eq(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
            // 1218 draws: a standard deviation of 0.014 at most, four are allowed.
            assert!((dropped - p).abs() < 0.06, "{dropped} of {p}");
        }
    }
}

/// More rows than are drawn at a time, of few channels and of many.
#[test]
fn plain_dropout_goes_on_where_its_pieces_meet() {
    for (n_rows, channels) in [(70_000i64, 250i64), (3, 6_000_000)] {
        let (slots, tokens): (Vec<i64>, Vec<i64>) = (0..n_rows).map(|row| (row / 7, row % 7)).unzip();
        let origin = RowOrigin { slot_n: Tensor::from_slice(&slots), token_n: Tensor::from_slice(&tokens) };
        let ones = Tensor::ones([n_rows, channels], (Kind::BFloat16, Device::Cpu));
        let ours =
            dropout::apply(target_of(&ones), &ones, DropoutKey { p: 0.1, seed: 3, step: 9 }, 2, &origin).unwrap();
        let draw = MaskDraw { seed: 3, step: 9, site: 2, drop_below: 6554 };
        assert!(ours.equal(&dropout::plain_apply(&ones, &origin, draw).unwrap()), "{n_rows} rows of {channels}");
    }
}

#[test]
fn deterministic_is_a_key_that_a_resumed_run_may_change() {
    let lab = Lab::new(Shape::default());
    let (plain, set) = (lab.config(&[]), lab.config(&["train.deterministic=true"]));
    assert!(!plain.train.deterministic && set.train.deterministic);
    assert!(set.to_toml().contains("\ndeterministic = true\n"), "{}", set.to_toml());
    assert_eq!(Config::parse(&set.to_toml(), "its own", &[]).unwrap(), set);
    let differences = set.differences(&plain.values());
    assert!(differences.iter().all(|d| d.meaning == Meaning::Rounding), "{differences:?}");
    let error = Config::load(&lab.config_file(), &lab.sets(&["train.deterministic=1"])).unwrap_err();
    assert!(error.to_string().contains("expected true or false"), "{error}");
}

#[test]
fn a_deterministic_run_on_a_cpu_is_the_run_that_it_would_be() {
    let lab = Lab::new(Shape::default());
    let trained = |name: &str, deterministic: &str| {
        let output = format!("train.output={}", lab.path(name).display());
        lab.run("train", &[], &[&output, deterministic, "train.max_steps=2"]).ok();
        std::fs::read(lab.path(name).join("adapter/adapter_model.safetensors")).unwrap()
    };
    let (without, with) =
        (trained("without", "train.deterministic=false"), trained("with", "train.deterministic=true"));
    assert!(without == with, "the switches change nothing on a CPU");
}

#[test]
fn the_program_has_what_libraries_read_at_their_start() {
    let lab = Lab::new(Shape::default());
    // A fault that shows only after the program has started itself again; the environment is the process's own.
    let mut process = lab.command("train", &[], &["train.max_steps=400000", "train.log_every=0"]);
    let mut child = process
        .env_remove("OMP_WAIT_POLICY")
        .env_remove("PYTORCH_CUDA_ALLOC_CONF")
        .env_remove("PYTORCH_ALLOC_CONF")
        .env("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let environment = format!("/proc/{}/environ", child.id());
    let mut found = String::new();
    // It takes a moment until the process is the second one.
    for _ in 0..500 {
        found =
            std::fs::read(&environment).map(|e| String::from_utf8_lossy(&e).replace('\0', "\n")).unwrap_or_default();
        if found.contains("OMP_WAIT_POLICY=passive\n") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(found.contains("OMP_WAIT_POLICY=passive\n"), "{found}");
    assert!(found.contains("CUBLAS_WORKSPACE_CONFIG=:16:8\n"), "what the user has set stays: {found}");
    assert!(found.contains("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True\n"), "{found}");
}

/// Runs a copy of the set-up script where nothing can be downloaded: `nvidia-smi` answers as told, and pip writes its
/// arguments down and makes all files. Gives the exit code, what was said, and pip's arguments.
fn set_up(dir: &Path, arguments: &[&str], nvidia_smi: Option<&str>) -> (Option<i32>, String, String) {
    let (scripts, bin) = (dir.join("scripts"), dir.join("bin"));
    let _ = std::fs::remove_dir_all(&bin);
    std::fs::create_dir_all(&scripts).unwrap();
    std::fs::create_dir_all(&bin).unwrap();
    for name in ["setup.sh", "lib.sh"] {
        std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name), scripts.join(name)).unwrap();
    }
    let program = |name: &str, text: &str| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::write(bin.join(name), format!("#!/bin/bash\n{text}\n")).unwrap();
        std::fs::set_permissions(bin.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    // Nothing else of this machine is to be seen, its own nvidia-smi least of all.
    for tool in ["bash", "basename", "cat", "dirname", "flock", "grep", "ln", "mkdir", "mv", "rm", "uname"] {
        let from = ["/usr/bin", "/bin"].map(|dir| Path::new(dir).join(tool)).into_iter().find(|path| path.exists());
        std::os::unix::fs::symlink(from.unwrap(), bin.join(tool)).unwrap();
    }
    program("cargo", "exit 1");
    program("c++", "exit 1");
    // The stand-in for pip: an argument behind --target is the folder, and every set brings all files.
    program(
        "python3",
        r#"[ "$3" = --version ] && exit 0
echo "$*" >>"$PIP_SAID"
while [ "$1" != --target ]; do shift; done
cd "$2"
for file in torch/lib/lib{torch_cpu,c10,torch_cuda,c10_cuda}.so torch/include/torch/csrc/api/include/torch/torch.h \
    nvidia/cu13/lib/lib{cudart,cupti,nvrtc}.so.13 nvidia/cu13/lib/libcublas{,Lt}.so.13 nvidia/cudnn/lib/libcudnn.so.9 \
    nvidia/nccl/lib/libnccl.so.2; do
    mkdir -p "$(dirname "$file")"
    echo x >"$file"
done"#,
    );
    if let Some(text) = nvidia_smi {
        program("nvidia-smi", text);
    }
    let said = dir.join("pip_said");
    let _ = std::fs::remove_file(&said);
    let output = Command::new("bash")
        .arg(scripts.join("setup.sh"))
        .args(arguments)
        .env("PATH", &bin)
        .env("PIP_SAID", &said)
        .env("HOME", dir)
        .output()
        .unwrap();
    let pip = std::fs::read_to_string(&said).unwrap_or_default();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned(), pip)
}

#[test]
fn set_up_fetches_what_this_machine_s_gpu_needs() {
    let capability = |lines: &str| format!("[ \"$1\" = --query-gpu=compute_cap ] && printf '{lines}'");
    let (lean, whole) = ("for the CPU, about 550 MB", "with CUDA 13, about 2.7 GB");
    for (nvidia_smi, arguments, size) in [
        (None, &[][..], lean),
        (Some("echo 'No devices were found'; exit 6".to_string()), &[], lean),
        (Some(capability("9.0\\n")), &[], whole),
        (Some(capability("7.5\\n")), &[], whole),
        (Some(capability("12.0\\n8.9\\n")), &[], whole),
        (Some(capability("9.0\\n")), &["--cpu"], lean),
        (Some(capability("7.0\\n")), &["--cpu"], lean),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (code, said, pip) = set_up(dir.path(), arguments, nvidia_smi.as_deref());
        let about = format!("{nvidia_smi:?} {arguments:?}: {said}");
        assert_eq!(code, Some(0), "{about}");
        assert!(said.contains(size), "{about}");
        assert!(pip.contains("torch==2.11.0") && pip.contains("nvidia-cuda-runtime==13.0.96"), "{pip}");
        assert_eq!(pip.contains("nvidia-cudnn-cu13=="), size == whole, "{pip}");
        // A second call finds it in place; a GPU is not content with what a CPU needs.
        let (code, said, pip) = set_up(dir.path(), arguments, nvidia_smi.as_deref());
        assert_eq!((code, pip.as_str()), (Some(0), ""), "{said}");
        assert!(said.contains("is in place"), "{said}");
        let (code, said, _) = set_up(dir.path(), &[], Some(&capability("9.0\\n")));
        assert_eq!((code, said.contains(whole)), (Some(0), size == lean), "{said}");
        let (code, said, pip) = set_up(dir.path(), &["--cpu"], None);
        assert_eq!((code, pip.as_str()), (Some(0), ""), "the whole set serves a CPU: {said}");
    }
}

#[test]
fn set_up_says_what_serves_a_gpu_older_than_cuda_13() {
    let too_old = "[ \"$1\" = -L ] && { echo 'GPU 0: Tesla K40'; exit 0; }; exit 2";
    for (nvidia_smi, what) in [
        ("echo 7.0", "has compute capability 7.0"),
        ("printf '9.0\\n6.1\\n'", "has compute capability 6.1"),
        (too_old, "does not say its compute capability"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (code, said, pip) = set_up(dir.path(), &[], Some(nvidia_smi));
        assert_eq!((code, pip.as_str()), (Some(1), ""), "{said}");
        for part in [what, "begins at 7.5", "cu126", "--cpu", "LD_LIBRARY_PATH=<site-packages>/torch/lib"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(!dir.path().join(".libtorch").exists());
        // Once built without CUDA, other scripts that begin with this one go on.
        assert_eq!(set_up(dir.path(), &["--cpu"], Some(nvidia_smi)).0, Some(0));
        let (code, said, _) = set_up(dir.path(), &[], Some(nvidia_smi));
        assert_eq!((code, said.contains("is in place")), (Some(0), true), "{said}");
    }
    let dir = tempfile::tempdir().unwrap();
    let (code, said, _) = set_up(dir.path(), &["--gpu"], None);
    assert_eq!((code, said.contains("--gpu is not known")), (Some(1), true), "{said}");
}
