//! `bellora selftest`, what it would notice, and a rehearsal of the check on a GPU.

use std::path::Path;
use std::process::Command;

use bellora::device::{self, Cuda};
use bellora::ops::rms_norm;
use bellora::selftest::{Row, SelftestReport, TestedMachine, largest_error, tolerance};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::support::{bellora, run, target_of};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

fn selftest(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = bellora().arg("selftest").args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_cpu_is_in_order_in_all_its_dtypes() {
    let (code, stdout, stderr) = selftest(&["--device", "cpu", "--json"]);
    assert_eq!(code, Some(0), "{stderr}{stdout}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["ok"], true);
    assert_eq!(report["machine"]["device"], "cpu");
    assert!(report["machine"]["free_bytes"].as_u64().unwrap() > 1 << 20);
    let rows = report["rows"].as_array().unwrap();
    // A device that hangs shows where: every row was told before, in the same order.
    let told: Vec<&str> = stderr.lines().filter(|line| line.ends_with("  ok")).collect();
    assert_eq!(told.len(), rows.len(), "{stderr}");
    assert!(told.iter().zip(rows).all(|(line, row)| line.starts_with(row["op"].as_str().unwrap())), "{stderr}");
    let of_dtype = |dtype: &str| rows.iter().filter(|row| row["dtype"] == dtype).collect::<Vec<_>>();
    for dtype in ["fp32", "bf16", "fp16"] {
        let rows = of_dtype(dtype);
        let ops = "gemm embedding rms_norm rope attention swiglu dropout cross_entropy training".split(' ');
        let fp32_ops = if dtype == "fp32" {
            &["grad_norm", "adamw", "collectives all_reduce", "collectives broadcast"][..]
        } else {
            &[]
        };
        for op in ops.chain(fp32_ops.iter().copied()) {
            assert!(rows.iter().any(|row| row["op"].as_str().unwrap().starts_with(op)), "no {op} in {dtype}");
        }
        for row in rows {
            let (error, bound) = (row["error"].as_f64().unwrap(), row["tolerance"].as_f64().unwrap());
            println!("{} {dtype}: {error:.1e} of {bound:.1e}", row["op"]);
            assert!(row["ok"] == true && error <= bound, "{row}");
            // A bound that a result without any right digit would meet is none.
            assert!(bound <= 0.05, "{row}");
        }
    }
    // The tiny run learns: what it was compared in is more than a constant.
    let losses: Vec<f64> = serde_json::from_value(report["training"][0]["losses"].clone()).unwrap();
    assert!(losses[losses.len() - 1] < 0.9 * losses[0], "{losses:?}");
}

#[test]
fn kernels_are_the_ops_alone() {
    let (code, stdout, stderr) = selftest(&["--device", "cpu", "--json", "--kernels"]);
    assert_eq!(code, Some(0), "{stderr}{stdout}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let ops: Vec<&str> = report["rows"].as_array().unwrap().iter().map(|row| row["op"].as_str().unwrap()).collect();
    for op in ["gemm", "attention", "dropout", "cross_entropy", "adamw"] {
        assert!(ops.iter().any(|row| row.starts_with(op)), "no {op} in {ops:?}");
    }
    let others: Vec<_> = ops.iter().filter(|op| op.starts_with("training") || op.starts_with("collectives")).collect();
    assert!(others.is_empty() && report["training"].as_array().unwrap().is_empty(), "{others:?}");
}

#[test]
fn the_table_names_every_result() {
    let (code, stdout, stderr) = selftest(&["--device", "cpu"]);
    assert_eq!(code, Some(0), "{stderr}{stdout}");
    assert!(stdout.starts_with("device  the CPU, 1 threads, "), "{stdout}");
    assert!(stdout.contains("\nattention grouped dk "), "{stdout}");
    let last = stdout.lines().last().unwrap();
    let n_ok = stdout.lines().filter(|line| line.ends_with("  ok")).count();
    assert_eq!(last, format!("{n_ok} of {n_ok} results are in order"));
}

#[test]
fn a_missing_gpu_is_named_with_exit_code_2() {
    let Cuda::Missing { what, hint } = device::cuda() else {
        println!("skipped: this machine has a GPU");
        return;
    };
    let (code, stdout, stderr) = selftest(&["--device", "cuda"]);
    assert_eq!((code, stdout.as_str()), (Some(2), ""), "{stderr}");
    assert_eq!(stderr, format!("error: --device cuda: {what}\n  hint: {hint}\n"));
}

fn machine() -> TestedMachine {
    TestedMachine { device: "cpu", dtypes: vec!["fp32"], free_bytes: 1, gpu: None }
}

#[test]
fn a_wrong_result_is_noticed() {
    let judge = Tensor::from_slice(&[1.0f64, -4.0, 0.5, 2.0]).view([2, 2]);
    let with = |at: i64, value: f64| {
        let wrong = judge.copy();
        let _ = wrong.view([4]).get(at).fill_(value);
        largest_error(&wrong, &judge).unwrap()
    };
    assert_eq!(largest_error(&judge.copy(), &judge).unwrap(), 0.0);
    assert_eq!(with(2, 0.75), 0.25 / 4.0);
    for bad in [f64::NAN, f64::INFINITY] {
        assert_eq!(with(0, bad), f64::INFINITY);
    }
    assert_eq!(largest_error(&judge.view([4]), &judge).unwrap(), f64::INFINITY);
    let nothing = judge.zeros_like();
    assert_eq!(largest_error(&judge, &nothing).unwrap(), f64::INFINITY);
    assert_eq!(largest_error(&nothing, &nothing).unwrap(), 0.0);

    let good = Row::new("a", Kind::Float, 1e-7, 1e-6);
    for bad in [
        Row::new("b", Kind::Float, 2e-6, 1e-6),
        Row::new("b", Kind::Float, f64::INFINITY, 1e-6),
        Row::new("b", Kind::Float, f64::NAN, 1e-6),
        Row::without_result("b", Kind::Float, "no kernel".into()),
    ] {
        let report = SelftestReport::new(machine(), vec![good.clone(), bad], Vec::new());
        assert!(!report.ok);
        assert_eq!(report.failed().map(|row| row.op.as_str()).collect::<Vec<_>>(), ["b"]);
    }
    assert!(SelftestReport::new(machine(), vec![good], Vec::new()).ok);
}

/// One row of a norm in bf16 that was made of its neighbour's statistics, which are a few hundredths off.
#[test]
fn a_row_with_wrong_statistics_is_noticed() {
    tch::manual_seed(3);
    let x = Tensor::randn([37, 200], F32).to_kind(Kind::BFloat16);
    let w = Tensor::ones([200], (Kind::BFloat16, Device::Cpu));
    let wide = |t: &Tensor| t.to_kind(Kind::Double);
    let (y, saved) = rms_norm::forward(target_of(&x), &x, &w, 1e-5).unwrap();
    let (judge, _) = rms_norm::plain_forward(&wide(&x), &wide(&w), 1e-5).unwrap();
    let bound = tolerance(Kind::BFloat16, 1, 200);
    assert!(largest_error(&y, &judge).unwrap() <= bound);
    let rstd = &saved.rstd_n1;
    let farthest = (rstd / rstd.get(0) - 1.0).abs().argmax(None, false).int64_value(&[]);
    y.get(0).copy_(&(wide(&x.get(0)) * wide(&rstd.get(farthest))));
    assert!(largest_error(&y, &judge).unwrap() > bound);
}

/// Products in TF32 keep ten binary places of their operands, as fp16 does.
#[test]
fn products_in_tf32_are_noticed() {
    tch::manual_seed(4);
    let (a, b) = (Tensor::randn([96, 192], F32), Tensor::randn([192, 136], F32));
    let judge = a.to_kind(Kind::Double).matmul(&b.to_kind(Kind::Double));
    let bound = tolerance(Kind::Float, 1, 192);
    assert!(largest_error(&a.matmul(&b), &judge).unwrap() <= bound);
    let short = |t: &Tensor| t.to_kind(Kind::Half).to_kind(Kind::Float);
    let error = largest_error(&short(&a).matmul(&short(&b)), &judge).unwrap();
    assert!(error > bound, "{error:.1e} of {bound:.1e}");
}

fn script(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)
}

#[test]
fn the_check_on_a_gpu_is_rehearsed_from_end_to_end() {
    let out = tempfile::tempdir().unwrap();
    let mut rehearsal = Command::new(script("gpu_check.sh"));
    rehearsal.args(["--rehearse", "--no-peers"]).arg(out.path());
    rehearsal.env("BELLORA", env!("CARGO_BIN_EXE_bellora")).env("OMP_NUM_THREADS", "1").env_remove("OUT");
    let output = rehearsal.output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    let json =
        |name: &str| -> Value { serde_json::from_slice(&std::fs::read(out.path().join(name)).unwrap()).unwrap() };
    assert_eq!(json("selftest.json")["ok"], true);
    for (name, dtype, dropout) in [
        ("bench-bf16.json", "bf16", 0.05),
        ("bench-again.json", "bf16", 0.05),
        ("bench-dropout0.json", "bf16", 0.0),
        ("bench-fp16.json", "fp16", 0.05),
    ] {
        assert_eq!(json(name)["dtype"], dtype);
        assert_eq!(json(name)["lora"]["dropout"], dropout);
        assert!(json(name)["tokens_per_s"].as_f64().unwrap() > 0.0);
    }
    let repeat = json("repeat.json");
    assert_eq!((&repeat["repeated_is_identical"], &repeat["resumed_is_identical"]), (&true.into(), &true.into()));
    assert_eq!(repeat["losses"].as_array().unwrap().len(), 8);
    let parts = json("parts.json");
    let done: Vec<_> = parts.as_array().unwrap().iter().map(|part| part["part"].as_str().unwrap()).collect();
    let parts = "selftest pieces pieces-python bench-bf16 bench-again bench-dropout0 trace bench-fp16 repeat";
    assert_eq!(done.join(" "), parts);
    // Where this Python has no torch, the part says so and the others go on.
    let pieces = json("pieces-python.json");
    let timed = pieces["pieces"].as_array().unwrap().iter().any(|piece| piece["median_s"].as_f64() > Some(0.0));
    assert!(pieces["skipped"].is_string() || timed, "{pieces}");
    let pieces = json("pieces.json");
    assert!(pieces["pieces"].as_array().unwrap().iter().any(|piece| piece["name"] == "frozen qkv"), "{pieces}");
    let (trace, events) = (json("trace.json"), json("trace-events.json"));
    assert_eq!(trace["trace"]["n_events"], events["events"].as_array().unwrap().len());
    for told in ["\nclocks: ", "\n| piece, by bellora ", "\n| frozen qkv |", "\ntrace: ", "\n| aten::"] {
        assert!(stdout.contains(told), "no {told:?} in {stdout}");
    }
    // One file to carry away, with every part's figures.
    let tar = out.path().join("gpu-check.tar.gz");
    assert!(std::fs::metadata(&tar).unwrap().len() < 16_000_000);
    let held = run(Command::new("tar").arg("-tzf").arg(&tar)).ok().stdout;
    for name in done.iter().copied().chain(["parts", "machine", "summary", "trace-events"]) {
        assert!(held.lines().any(|line| line == format!("gpu-check/{name}.json")), "no {name} in {held}");
    }
    assert!(stdout.starts_with("# A rehearsal on the CPU: no claim\n"), "{stdout}");
    assert_eq!(std::fs::read_to_string(out.path().join("summary.md")).unwrap(), stdout);
}

#[test]
fn scripts_are_whole() {
    let found = run(Command::new("bash").arg("-n").arg(script("gpu_check.sh")));
    assert_eq!(found.ok().stderr, "");
}
