//! Runs that are killed in the middle of anything, and runs on a file system that is full: processes of their own, on the
//! disk of this machine.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bellora::checkpoint::manifest::{newest_good, verify};
use bellora::disk::names;

use crate::resume::{assert_same_run, n_lines};
use crate::support::{Draws, Lab, Shape, bellora, run};

const N_KILLS: usize = 10;

/// Whether a checkpoint is being written or an old one deleted.
fn is_saving(run_dir: &Path) -> bool {
    names(&run_dir.join("checkpoints")).unwrap().iter().any(|name| name.starts_with(".incomplete-"))
}

/// The longer form is `scripts/durability/kill.py`.
#[test]
fn kills_at_random_moments_change_nothing() {
    let lab = Lab::new(Shape::default());
    let output = format!("train.output={}", lab.path("run").display());
    let sets = ["train.max_steps=200", "train.global_batch=4", "train.checkpoint_every=4", "lora.dropout=0.1"];
    let lab = lab.with(&sets).with(&["train.keep_checkpoints=2", "train.log_every=50", "data.shuffle=true", &output]);
    let (run_dir, straight) = (lab.path("run"), lab.path("straight"));
    let started = Instant::now();
    lab.run("train", &[], &[]).ok();
    // Half of it at least is not the start.
    let start = started.elapsed() / 4;
    std::fs::rename(&run_dir, &straight).unwrap();

    let mut draws = Draws::new(11);
    let (mut newest, mut n_in_a_save, mut has_ended) = (0, 0, false);
    for kill in 0..N_KILLS {
        let mut child = lab.command("train", &["--resume"], &[]).stderr(Stdio::null()).spawn().unwrap();
        let share = draws.uniform();
        let waits_for_a_save = kill % 2 == 0;
        // A step of its own for each kill, so that steps are left for the last.
        let goal = 200 * kill / (N_KILLS + 2);
        let is_time = |since: Instant| match kill % 3 {
            0 => since.elapsed() > start.mul_f64(share),
            _ => n_lines(&run_dir) > goal && (!waits_for_a_save || is_saving(&run_dir)),
        };
        let since = Instant::now();
        while !is_time(since) && child.try_wait().unwrap().is_none() {
            assert!(since.elapsed() < Duration::from_secs(120), "the run makes no progress");
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_micros(draws.below(4000) as u64));
        n_in_a_save += usize::from(is_saving(&run_dir));
        child.kill().unwrap();
        if let Some(code) = child.wait().unwrap().code() {
            // A save that the kill was to meet did not come by the end of the run: there is nothing left to kill.
            assert!(code == 0 && kill >= N_KILLS / 2, "kill {kill}: the run had ended before, with {code}");
            has_ended = true;
            break;
        }

        let checkpoints = run_dir.join("checkpoints");
        for name in names(&checkpoints).unwrap().iter().filter(|name| name.starts_with("step-")) {
            verify(&checkpoints.join(name)).unwrap();
        }
        let was = newest;
        newest = newest_good(&checkpoints).unwrap().good.map_or(0, |(step, _)| step);
        assert!(newest >= was, "kill {kill}: the checkpoint of step {was} is lost");
    }
    let ran = lab.run("train", &["--resume"], &[]).ok();
    assert!(
        newest == 0 || has_ended || ran.stderr.contains(&format!("goes on from step {newest} of 200")),
        "{}",
        ran.stderr
    );
    assert!(newest > 0 && n_in_a_save > 0, "no kill came late, or none in a save");
    assert_same_run("killed", &run_dir, &straight);
}

/// In a namespace of its own: mounts a small file system on the run's folder, trains, fills what room is left while the
/// run is held, lets it go on until a save has failed and lines
/// wait, makes room, and copies the finished run out.
const ON_A_SMALL_FILE_SYSTEM: &str = r#"
set -eu
small=$1 out=$2
shift 2
mount -t tmpfs -o size=24m tmpfs "$small" 2>/dev/null || exit 77
"$@" 2>"$out/stderr" &
run=$!
until_or_end() {
    until eval "$1"; do
        kill -0 $run 2>/dev/null || { echo "the run ended too early"; cat "$out/stderr"; exit 1; }
        sleep 0.005
    done
}
until_or_end '[ -d "$small/run/checkpoints/step-00000003" ]'
kill -STOP $run
dd if=/dev/zero of="$small/ballast" bs=4k 2>/dev/null && { echo "the ballast fits"; exit 1; }
kill -CONT $run
until_or_end 'grep -q "could not be written" "$out/stderr"'
until_or_end 'grep -q "no room on the disk for" "$out/stderr"'
rm "$small/ballast"
wait $run || { echo "the run ended with $?"; cat "$out/stderr"; exit 1; }
cp -r "$small/run" "$out/run"
"#;

#[test]
fn a_full_file_system_costs_saves_and_not_the_run() {
    let lab = Lab::new(Shape::default());
    let (small, out) = (lab.path("small"), lab.path("out"));
    let output = format!("train.output={}", small.join("run").display());
    let sets = ["train.max_steps=240", "train.global_batch=2", "train.checkpoint_every=3", "lora.dropout=0.1"];
    let lab = lab.with(&sets).with(&["train.keep_checkpoints=2", &output]);
    std::fs::create_dir(&small).unwrap();
    std::fs::create_dir(&out).unwrap();
    let train = lab.command("train", &[], &[]);
    let mut process = Command::new("unshare");
    process.args(["--user", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_FILE_SYSTEM, "sh"]);
    process.args([&small, &out]).arg(train.get_program()).args(train.get_args()).env("OMP_NUM_THREADS", "1");
    let ended = match process.output() {
        // 77: no mount; 1 without a word from the script: no namespace.
        Ok(ended) if ended.status.code() == Some(77) || (!ended.status.success() && ended.stdout.is_empty()) => {
            println!("not tried: nothing can be mounted here ({})", String::from_utf8_lossy(&ended.stderr).trim());
            return;
        }
        Ok(ended) => ended,
        Err(error) => {
            println!("not tried: unshare does not start ({error})");
            return;
        }
    };
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stdout));
    let told = std::fs::read_to_string(out.join("stderr")).unwrap();
    assert!(told.contains("training goes on") && told.contains("there is room on the disk again"), "{told}");

    // The same without the small file system.
    run(bellora().args(train.get_args())).ok();
    assert_same_run("on a small file system", &out.join("run"), &small.join("run"));
}
