//! `verify`: whatever is damaged in a run's folder is named, and nothing else is.

use std::path::{Path, PathBuf};

use bellora::run::verify::{Verdict, Verification, VerifiedPart, inspect};
use serde_json::Value;

use crate::resume::{files, step_dir};
use crate::support::{Lab, Shape, bellora, run};

/// A job of eight updates with an evaluation and a checkpoint after every second.
fn lab() -> Lab {
    let sets = ["train.max_steps=8", "train.checkpoint_every=2", "train.keep_checkpoints=2", "train.eval_every=2"];
    Lab::new(Shape::default()).with(&sets).with(&["data.validation_fraction=0.2"])
}

/// Such a job's run, finished.
fn run_of(lab: &Lab) -> PathBuf {
    lab.run("train", &[], &[]).ok();
    lab.path("run")
}

/// `bellora verify`: exit code, stdout, stderr.
fn verify(path: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = bellora().arg("verify").arg(path).args(arguments).output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code(), stdout, stderr)
}

fn damaged(report: &Verification) -> Vec<&VerifiedPart> {
    report.parts.iter().filter(|part| part.verdict == Verdict::Damaged).collect()
}

/// Changes a file, looks at the run, and puts the file back: the one part that is damaged then.
#[track_caller]
fn damaged_by(run_dir: &Path, file: &Path, contents: Option<&[u8]>) -> VerifiedPart {
    let before = std::fs::read(file).unwrap();
    match contents {
        Some(contents) => std::fs::write(file, contents).unwrap(),
        None => std::fs::remove_file(file).unwrap(),
    }
    let report = inspect(run_dir).unwrap();
    std::fs::write(file, before).unwrap();
    assert!(!report.whole);
    let [part] = damaged(&report)[..] else { panic!("{}: {report:#?}", file.display()) };
    part.clone()
}

#[test]
fn a_run_is_whole_and_each_part_is_named() {
    let lab = lab();
    let run_dir = run_of(&lab);
    let left = run_dir.join("checkpoints/.incomplete-step-00000009");
    std::fs::create_dir(&left).unwrap();
    std::fs::write(run_dir.join(".config.toml.new"), "half").unwrap();
    let before = files(&run_dir);
    let (code, stdout, stderr) = verify(&run_dir, &[]);
    assert_eq!((code, &*stderr), (Some(0), ""));
    let lines: Vec<&str> = stdout.lines().collect();
    let names = lines.iter().map(|line| line.split(": ").next().unwrap()).collect::<Vec<_>>();
    let expected = [
        "config.toml",
        "checkpoints/step-00000006",
        "checkpoints/step-00000008",
        "metrics.jsonl",
        "tensorboard",
        "adapter",
        ".config.toml.new",
        "checkpoints/.incomplete-step-00000009",
    ];
    assert_eq!(names, expected, "{stdout}");
    assert!(lines[..6].iter().all(|line| line.contains(": whole")) && lines[3].ends_with(": 8 updates"), "{stdout}");
    assert!(lines[6..].iter().all(|line| line.contains(": harmless: ")), "{stdout}");
    let (code, json, _) = verify(&run_dir, &["--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert!(code == Some(0) && json["whole"] == true && json["parts"].as_array().unwrap().len() == 8, "{json}");
    assert!(json["parts"][1]["name"] == expected[1] && json["parts"][1]["verdict"] == "whole", "{json}");
    assert!(files(&run_dir) == before, "a file has changed");

    // Its adapter and a checkpoint by themselves, and what is exported.
    for format in ["peft", "merged"] {
        let out = lab.path(format);
        run(bellora().arg("export").arg(&run_dir).args(["--format", format, "--out"]).arg(&out)).ok();
    }
    for path in [run_dir.join("adapter"), step_dir(&run_dir, 8), lab.path("peft"), lab.path("merged")] {
        let (code, stdout, _) = verify(&path, &[]);
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(code == Some(0) && stdout.starts_with(&format!("{name}: whole: ")), "{stdout}");
        assert_eq!(stdout.lines().count(), 1);
        // A file of the user's own is nobody's business.
        std::fs::write(path.join("README.md"), "mine").unwrap();
        assert!(inspect(&path).unwrap().whole);
        let weights = ["adapter_model.safetensors", "model.safetensors"].map(|name| path.join(name));
        let weights = weights.into_iter().find(|path| path.exists()).unwrap();
        let part = damaged_by(&path, &weights, Some(b"short"));
        assert!(part.name == name && part.details[0].contains("safetensors: damaged: expected"), "{part:?}");
    }
}

#[test]
fn a_byte_a_length_or_a_file_that_is_otherwise_is_found_in_every_folder() {
    let lab = lab();
    let run_dir = run_of(&lab);
    let of_manifests = files(&run_dir);
    let of_manifests: Vec<_> =
        of_manifests.iter().filter(|(path, _)| path.parent().unwrap().join("MANIFEST.json").exists()).collect();
    assert_eq!(of_manifests.iter().filter(|(path, _)| path.ends_with("MANIFEST.json")).count(), 3);
    for (path, contents) in of_manifests {
        let folder = path.parent().unwrap().strip_prefix(&run_dir).unwrap().to_str().unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let mut flipped = contents.clone();
        flipped[contents.len() / 2] ^= 4;
        for contents in [Some(&flipped[..]), Some(&contents[..contents.len() - 1]), None] {
            let part = damaged_by(&run_dir, path, contents);
            assert_eq!(part.name, folder, "{part:?}");
            assert!(part.details.iter().any(|detail| detail.contains(name)), "{name}: {part:?}");
        }
    }
    assert!(inspect(&run_dir).unwrap().whole);

    // Told on the command line, too.
    std::fs::remove_file(step_dir(&run_dir, 6).join("state.json")).unwrap();
    std::fs::remove_file(run_dir.join("adapter/MANIFEST.json")).unwrap();
    let (code, stdout, stderr) = verify(&run_dir, &[]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stdout.contains("checkpoints/step-00000006: damaged: state.json: missing"), "{stdout}");
    assert!(stdout.contains("adapter: damaged: MANIFEST.json: missing"), "{stdout}");
    assert!(stdout.contains("checkpoints/step-00000008: whole"), "{stdout}");
    assert!(stderr.contains("2 of 6 parts are damaged") && stderr.contains("hint: "), "{stderr}");
    let (code, json, _) = verify(&run_dir, &["--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert!(code == Some(1) && json["whole"] == false && json["parts"][1]["verdict"] == "damaged", "{json}");
}

#[test]
fn a_checkpoint_under_another_ones_name_is_damaged() {
    let lab = lab();
    let run_dir = run_of(&lab);
    std::fs::rename(step_dir(&run_dir, 6), step_dir(&run_dir, 7)).unwrap();
    let report = inspect(&run_dir).unwrap();
    let [part] = damaged(&report)[..] else { panic!("{report:?}") };
    assert_eq!((&*part.name, &*part.details[0]), ("checkpoints/step-00000007", "state.json: is of step 6"));
}

#[test]
fn metrics_must_have_every_update_once_and_know_of_the_newest_checkpoint() {
    let lab = lab();
    let run_dir = run_of(&lab);
    let path = run_dir.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    // Updates 1 and 2, an evaluation, updates 3 and 4, an evaluation, and so on.
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    assert_eq!(lines.len(), 12);
    let but = |left_out: &[usize]| -> String {
        lines.iter().enumerate().filter(|(i, _)| !left_out.contains(&(i + 1))).map(|(_, line)| *line).collect()
    };
    let cases = [
        (but(&[4]), "line 4: step 3 is missing before it"),
        (but(&[4, 5, 7]), "line 5: steps 3 to 5 are missing before it"),
        (but(&[11]), "ends with step 7, and there is a checkpoint of step 8"),
        (but(&[6]), "has 11 lines up to step 8, and the checkpoint knows of 12"),
        (text.replacen(lines[3], &lines[3].repeat(2), 1), "line 5: step 3 comes after step 3"),
        (text.replacen(lines[3], "what is this\n", 1), "line 4: is no line of metrics"),
        (String::new(), "ends with step 0"),
    ];
    for (contents, expected) in cases {
        let part = damaged_by(&run_dir, &path, Some(contents.as_bytes()));
        assert_eq!(part.name, "metrics.jsonl");
        assert!(part.details[0].starts_with(expected), "{expected}: {part:?}");
    }
    // So many that they are counted.
    let part = damaged_by(&run_dir, &path, Some("no\n".repeat(9).as_bytes()));
    assert_eq!((part.details.len(), &*part.details[3]), (4, "and 7 more"), "{part:?}");
    let part = damaged_by(&run_dir, &path, None);
    assert_eq!(part.details, ["missing"]);

    // Lines beyond the newest checkpoint come again when the run goes on; a torn one is what a kill leaves.
    std::fs::write(&path, format!("{text}{}{{\"step\":10,\"lo", lines[10].replace("\"step\":8", "\"step\":9")))
        .unwrap();
    let report = inspect(&run_dir).unwrap();
    let part = report.parts.iter().find(|part| part.name == "metrics.jsonl").unwrap();
    assert!(report.whole && part.details[0] == "9 updates" && part.details[1].contains("torn"), "{part:?}");
}

#[test]
fn tensorboards_records_are_held_against_their_checksums() {
    let lab = lab();
    let run_dir = run_of(&lab);
    let found = files(&run_dir.join("tensorboard"));
    let [(path, contents)] = &found.iter().collect::<Vec<_>>()[..] else { panic!("{:?}", found.keys()) };
    // The version, the start, eight updates and four evaluations.
    let n_records = 14;
    let part_of = |contents: &[u8]| {
        std::fs::write(path, contents).unwrap();
        let parts = inspect(&run_dir).unwrap().parts;
        parts.into_iter().find(|part| part.name == "tensorboard").unwrap()
    };
    assert_eq!(part_of(contents).details, [format!("{n_records} records in 1 files")]);
    for at in (0..contents.len()).step_by(5) {
        let mut flipped = (*contents).clone();
        flipped[at] ^= 32;
        let part = part_of(&flipped);
        assert!(part.verdict == Verdict::Damaged && part.details[0].contains("the record at byte "), "{at}: {part:?}");
    }
    // Torn at the end, as a kill leaves it.
    for kept in [contents.len() - 1, contents.len() - 30, 13, 11, 0] {
        let part = part_of(&contents[..kept]);
        assert!(part.verdict == Verdict::Whole && !part.details[0].starts_with(&n_records.to_string()), "{part:?}");
    }
}

#[test]
fn a_config_that_cannot_be_read_is_damaged_and_moved_files_are_not() {
    let lab = lab();
    let run_dir = run_of(&lab);
    let path = run_dir.join("config.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let cases = [
        (text.replacen("[train]", "[tra", 1), "not valid TOML"),
        (text.replacen("seed = 42", "sed = 42", 1), "unknown key"),
        (text.replacen("seed = 42", "seed = \"x\"", 1), "found the text"),
    ];
    for (contents, expected) in cases {
        let part = damaged_by(&run_dir, &path, Some(contents.as_bytes()));
        assert!(part.name == "config.toml" && part.details[0].contains(expected), "{expected}: {part:?}");
    }
    // It is still known to be a run's folder.
    assert_eq!(damaged_by(&run_dir, &path, None).name, "config.toml");
    std::fs::rename(lab.path("base"), lab.path("elsewhere")).unwrap();
    std::fs::remove_file(lab.path("rows.jsonl")).unwrap();
    assert!(inspect(&run_dir).unwrap().whole);
}

#[test]
fn what_is_no_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    for (name, what) in [("folder", "holds neither a run"), ("file", "is no folder"), ("none", "is no folder")] {
        let (code, stdout, stderr) = verify(&dir.path().join(name), &[]);
        assert_eq!((code, &*stdout), (Some(2), ""), "{name}: {stderr}");
        assert!(stderr.contains(what) && stderr.contains("hint: "), "{name}: {stderr}");
    }
}

/// Whatever a run is writing at the moment.
#[test]
fn a_run_that_goes_on_is_whole_at_any_time() {
    let lab = lab().with(&["train.max_steps=80", "train.checkpoint_every=1", "train.keep_checkpoints=1"]);
    let run_dir = lab.path("run");
    let mut child = lab.command("train", &[], &[]).stderr(std::process::Stdio::null()).spawn().unwrap();
    let mut n_seen = 0;
    while child.try_wait().unwrap().is_none() {
        if run_dir.join("config.toml").exists() {
            let report = inspect(&run_dir).unwrap();
            assert!(report.whole, "{report:#?}");
            n_seen += usize::from(report.parts.len() > 2);
        }
    }
    assert!(n_seen > 0 && child.wait().unwrap().success());
}
