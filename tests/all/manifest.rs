//! Folders that are whole or absent: damage is found and named, interruptions leave nothing under a final name.

use std::path::{Path, PathBuf};

use bellora::checkpoint::folder::{NewFolder, replace_whole, sweep_incomplete, write_whole};
use bellora::checkpoint::manifest::{MANIFEST_FILE, newest_good, newest_good_before, step_dir, verify};
use bellora::checkpoint::retention::{Keep, prune};
use bellora::checkpoint::state::{BaseIdentity, ComputedOn, Evaluated, Extent, Identity, Record, STATE_FILE};
use bellora::disk::LocalDisk;
use bellora::engine::optim::loss_scale::LossScale;
use bellora::engine::state::TrainState;
use bellora::error::{Error, Result};

/// A checkpoint with a small file and one of more than one piece of the checksum's reading.
fn checkpoint(checkpoints: &Path, step: u64) -> PathBuf {
    let dir = step_dir(checkpoints, step);
    let large: Vec<u8> = (0..(3 << 20) + 5).map(|i: u32| (i / 7) as u8).collect();
    let write = |folder: &mut NewFolder<'_>| {
        folder.put("large.safetensors", &large)?;
        folder.put("state.json", b"{\"step\": 1}\n")
    };
    write_whole(&LocalDisk, &dir, write).unwrap();
    dir
}

fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_whole_folder_verifies_and_the_manifest_says_what_is_in_it() {
    let root = tempfile::tempdir().unwrap();
    let dir = checkpoint(&root.path().join("deep/checkpoints"), 200);
    assert!(dir.ends_with("deep/checkpoints/step-00000200"));
    let manifest = verify(&dir).unwrap();
    let sizes: Vec<_> = manifest.files.iter().map(|(name, entry)| (&**name, entry.size_bytes)).collect();
    assert_eq!(sizes, [("large.safetensors", (3 << 20) + 5), ("state.json", 12)]);
    // The checksum of the empty text is a published constant: the algorithm is the one the manifest names.
    let empty = write_whole(&LocalDisk, &root.path().join("empty"), |folder| folder.put("nothing", b"")).unwrap();
    assert_eq!(empty.files["nothing"].xxh3_64, "2d06800538d394c2");
    assert_eq!(listing(root.path()), ["deep", "empty"]);
}

#[test]
fn every_kind_of_damage_is_found_and_the_file_named() {
    type Damage = fn(&Path);
    let flip: Damage = |dir| {
        let mut bytes = std::fs::read(dir.join("large.safetensors")).unwrap();
        bytes[2_500_001] ^= 1;
        std::fs::write(dir.join("large.safetensors"), bytes).unwrap();
    };
    let cut: Damage = |dir| {
        let file = std::fs::OpenOptions::new().write(true).open(dir.join("large.safetensors")).unwrap();
        file.set_len(1000).unwrap();
    };
    let grow: Damage = |dir| std::fs::write(dir.join("state.json"), "{\"step\": 1}\n ").unwrap();
    let lose: Damage = |dir| std::fs::remove_file(dir.join("state.json")).unwrap();
    let no_manifest: Damage = |dir| std::fs::remove_file(dir.join(MANIFEST_FILE)).unwrap();
    let torn_manifest: Damage = |dir| std::fs::write(dir.join(MANIFEST_FILE), "{\"format_version\": 1, \"fi").unwrap();
    let other_space: Damage = |dir| {
        let text = std::fs::read_to_string(dir.join(MANIFEST_FILE)).unwrap();
        std::fs::write(dir.join(MANIFEST_FILE), text.replacen(' ', "\t", 1)).unwrap();
    };
    let later_manifest: Damage = |dir| {
        std::fs::write(dir.join(MANIFEST_FILE), "{\"format_version\": 2, \"files\": {}}").unwrap();
    };
    let cases = [
        (flip, "large.safetensors", "expected checksum"),
        (cut, "large.safetensors", "expected 3145733 bytes, found 1000"),
        (grow, "state.json", "expected 12 bytes, found 13"),
        (lose, "state.json", "missing"),
        (no_manifest, MANIFEST_FILE, "missing"),
        (torn_manifest, MANIFEST_FILE, "damaged"),
        (other_space, MANIFEST_FILE, "damaged: not as it was written"),
        (later_manifest, MANIFEST_FILE, "expected format version 1, found 2"),
    ];
    for (damage, name, what) in cases {
        let root = tempfile::tempdir().unwrap();
        let old = checkpoint(root.path(), 200);
        let new = checkpoint(root.path(), 1_000_000_000);
        damage(&new);
        let error = verify(&new).unwrap_err();
        let [fault] = error.faults() else { panic!("{what}: expected one fault, got {error}") };
        assert_eq!(fault.place, new.join(name).display().to_string());
        assert!(fault.what.contains(what), "{fault:?}");
        // The one before it is taken, and the damaged one named.
        let newest = newest_good(root.path()).unwrap();
        assert_eq!(newest.good, Some((200, old)));
        assert_eq!(newest.damaged.iter().map(|(dir, _)| dir).collect::<Vec<_>>(), [&new]);
        assert!(newest.damaged[0].1.to_string().contains(name));
        // Reaching the step again replaces it.
        replace_whole(&LocalDisk, &new, |folder| folder.put("again", b"1")).unwrap();
        assert_eq!(listing(&new), [MANIFEST_FILE, "again"]);
        assert_eq!(newest_good(root.path()).unwrap().good, Some((1_000_000_000, new)));
        assert_eq!(listing(root.path()), ["step-00000200", "step-1000000000"]);
    }
    let nothing = tempfile::tempdir().unwrap();
    assert!(newest_good(&nothing.path().join("absent")).unwrap().good.is_none());
}

#[test]
fn files_that_are_nobodys_business_are_no_damage() {
    let root = tempfile::tempdir().unwrap();
    let dir = checkpoint(root.path(), 200);
    std::fs::write(dir.join("notes.txt"), "mine").unwrap();
    std::fs::create_dir(dir.join("folder")).unwrap();
    verify(&dir).unwrap();
    assert_eq!(newest_good(root.path()).unwrap().good, Some((200, dir.clone())));
    checkpoint(root.path(), 400);
    assert_eq!(newest_good_before(root.path(), 400).unwrap().good, Some((200, dir)));
}

#[test]
fn interrupted_writes_leave_nothing_under_the_final_name() {
    let root = tempfile::tempdir().unwrap();
    let dir = step_dir(root.path(), 7);
    // An error while writing is handed on, and its folder goes at once.
    let failing = |folder: &mut NewFolder<'_>| -> Result<()> {
        folder.put("half", b"1")?;
        assert!(!dir.exists());
        Err(Error::failed("here", "disk full"))
    };
    assert_eq!(write_whole(&LocalDisk, &dir, failing).unwrap_err().to_string(), "here: disk full");
    assert_eq!(listing(root.path()), [""; 0]);
    // A process that dies while writing leaves its temporary folder alone (a panic stands for it).
    let dying = std::panic::AssertUnwindSafe(|| {
        write_whole(&LocalDisk, &dir, |folder| {
            folder.put("half", b"1")?;
            std::panic::resume_unwind(Box::new(()));
        })
    });
    assert!(std::panic::catch_unwind(dying).is_err());
    assert_eq!(listing(root.path()), [".incomplete-step-00000007"]);
    assert!(newest_good(root.path()).unwrap().good.is_none());
    std::fs::write(root.path().join(".incomplete-note"), "a file of the user's").unwrap();
    sweep_incomplete(&LocalDisk, root.path()).unwrap();
    assert_eq!(listing(root.path()), [".incomplete-note"]);
    sweep_incomplete(&LocalDisk, &root.path().join("absent")).unwrap();
    // What stands there already is not touched unless asked; an empty folder is no obstacle.
    std::fs::create_dir(&dir).unwrap();
    write_whole(&LocalDisk, &dir, |folder| folder.put("first", b"1")).unwrap();
    let unasked = |_: &mut NewFolder<'_>| panic!("nothing is written to a place that is taken");
    let refused = write_whole(&LocalDisk, &dir, unasked).unwrap_err();
    assert!(refused.to_string().contains("already exists") && refused.exit_code() == 1, "{refused}");
    // A replacement that fails leaves the old folder whole.
    replace_whole(&LocalDisk, &dir, |_| Err(Error::failed("here", "disk full"))).unwrap_err();
    assert_eq!(listing(&dir), [MANIFEST_FILE, "first"]);
    verify(&dir).unwrap();
}

/// Between the two renames of a replacement neither folder has the name.
#[test]
fn a_folder_whose_replacement_never_came_is_put_back() {
    let root = tempfile::tempdir().unwrap();
    let dir = checkpoint(root.path(), 7);
    let aside = root.path().join(".incomplete-old-step-00000007");
    std::fs::rename(&dir, &aside).unwrap();
    sweep_incomplete(&LocalDisk, root.path()).unwrap();
    verify(&dir).unwrap();
    assert_eq!(listing(root.path()), ["step-00000007"]);
    // One that is damaged, or whose replacement did come, goes.
    std::fs::rename(&dir, &aside).unwrap();
    checkpoint(root.path(), 7);
    sweep_incomplete(&LocalDisk, root.path()).unwrap();
    assert_eq!(listing(root.path()), ["step-00000007"]);
    std::fs::rename(&dir, &aside).unwrap();
    std::fs::write(aside.join("state.json"), "half").unwrap();
    sweep_incomplete(&LocalDisk, root.path()).unwrap();
    assert_eq!(listing(root.path()), [""; 0]);
}

/// An error of the disk says nothing about what a folder holds: it may be the only copy.
#[test]
fn a_replaced_folder_that_cannot_be_read_is_never_deleted() {
    let root = tempfile::tempdir().unwrap();
    let dir = step_dir(root.path(), 7);
    write_whole(&LocalDisk, &dir, |folder| folder.put("weights", b"")).unwrap();
    let aside = root.path().join(".incomplete-old-step-00000007");
    std::fs::rename(&dir, &aside).unwrap();
    std::fs::remove_file(aside.join("weights")).unwrap();
    // Empty by its size, and every read of it ends in EIO.
    std::os::unix::fs::symlink("/proc/self/mem", aside.join("weights")).unwrap();
    let of_sweep = sweep_incomplete(&LocalDisk, root.path()).unwrap_err();
    let of_replacement = replace_whole(&LocalDisk, &dir, |folder| folder.put("new", b"1")).unwrap_err();
    for error in [of_sweep, of_replacement] {
        let said = error.to_string();
        assert!(said.contains("the only copy of") && said.contains("Input/output error"), "{said}");
        assert_eq!(listing(root.path()), [".incomplete-old-step-00000007"]);
    }
    // Once it can be read it is put back, and replaced only by a whole one.
    std::fs::remove_file(aside.join("weights")).unwrap();
    std::fs::write(aside.join("weights"), b"").unwrap();
    replace_whole(&LocalDisk, &dir, |_| Err(Error::failed("here", "disk full"))).unwrap_err();
    replace_whole(&LocalDisk, &dir, |folder| {
        assert_eq!(listing(root.path()), [".incomplete-step-00000007", "step-00000007"]);
        folder.put("new", b"1")
    })
    .unwrap();
    assert_eq!(listing(&dir), [MANIFEST_FILE, "new"]);
}

fn newest(count: usize) -> Keep {
    Keep { newest: count, best: 0, steps: Vec::new() }
}

#[test]
fn retention_keeps_the_newest_and_what_is_not_a_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    for step in [9_999_999, 10_000_000, 99_999_999, 100_000_000, 100_000_001] {
        checkpoint(root.path(), step);
    }
    for other in ["step-final", "step-", "notes"] {
        std::fs::create_dir(root.path().join(other)).unwrap();
    }
    // The latest was there before a resume from an earlier one.
    let deleted = prune(&LocalDisk, root.path(), 100_000_000, &newest(1)).unwrap();
    assert_eq!(deleted, [9_999_999, 10_000_000, 99_999_999].map(|step| step_dir(root.path(), step)));
    let left = ["notes", "step-", "step-100000000", "step-100000001", "step-final"];
    assert_eq!(listing(root.path()), left);
    assert!(prune(&LocalDisk, root.path(), 100_000_000, &newest(1)).unwrap().is_empty());
}

fn steps(root: &Path) -> Vec<u64> {
    listing(root).iter().map(|name| name.strip_prefix("step-").unwrap().parse().unwrap()).collect()
}

#[test]
fn retention_does_not_count_what_is_damaged() {
    let root = tempfile::tempdir().unwrap();
    for step in 1..=5 {
        checkpoint(root.path(), step);
    }
    std::fs::write(step_dir(root.path(), 4).join("state.json"), "half").unwrap();
    prune(&LocalDisk, root.path(), 5, &newest(2)).unwrap();
    assert_eq!(steps(root.path()), [3, 4, 5]);
    checkpoint(root.path(), 6);
    prune(&LocalDisk, root.path(), 6, &newest(2)).unwrap();
    assert_eq!(steps(root.path()), [5, 6]);
}

#[test]
fn retention_keeps_the_best_and_the_pinned() {
    let root = tempfile::tempdir().unwrap();
    let losses = [Some(3.0), Some(1.0), None, Some(2.0), Some(1.0), Some(4.0), Some(5.0), Some(6.0)];
    for (step, eval_loss) in (1..).zip(losses) {
        let identity =
            Identity { base: BaseIdentity::Named(serde_json::Map::new()), data: String::new(), validation: None };
        let state = TrainState { step, ..TrainState::start(LossScale::none()) };
        let cpu = ComputedOn { device: "cpu".into(), threads: 1, ranks: 1 };
        let extent = Extent { steps_per_epoch: 8, total_steps: 8 };
        let mut record = Record::new(state, identity, extent, cpu, serde_json::Map::new());
        // An evaluation of another step says nothing of this one.
        record.evaluated = Some(Evaluated { step: if step == 8 { 7 } else { step }, eval_loss });
        let text = serde_json::to_string(&record).unwrap();
        let dir = step_dir(root.path(), step);
        write_whole(&LocalDisk, &dir, |folder| folder.put(STATE_FILE, text.as_bytes())).unwrap();
        prune(&LocalDisk, root.path(), step, &Keep { newest: 1, best: 2, steps: vec![3] }).unwrap();
    }
    assert_eq!(steps(root.path()), [2, 3, 5, 8]);
}

/// A number that came back a bit off would make a resumed run another one.
#[test]
fn numbers_of_a_record_come_back_as_they_were() {
    let mut draws = crate::support::Draws::new(3);
    for _ in 0..2000 {
        let number = draws.uniform() * 10f64.powi(draws.below(20) as i32 - 10);
        let text = serde_json::to_string(&Evaluated { step: 1, eval_loss: Some(number) }).unwrap();
        let back: Evaluated = serde_json::from_str(&text).unwrap();
        assert_eq!(back.eval_loss.unwrap().to_bits(), number.to_bits(), "{text}");
    }
}
