//! The binding of NCCL against a stand-in of its C interface, which notes what it is called with: how a communicator that
//! does not block is waited for, where parts lie, what becomes of errors. What NCCL computes is not seen here.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use bellora::comm::{Communicator, Nccl, Place, Rendezvous, Tcp};
use bellora::error::{Error, Fault, Result};
use tch::{Device, Kind, Tensor};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(400);

/// NCCL and the CUDA runtime. Every call is at work for one look. `MODE` says what goes wrong, `NOTES` where notes go.
const STAND_IN: &str = r#"
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { char bytes[128]; } id_t_;
typedef struct { int rank, looks, used; } comm_t_;
typedef struct { size_t size; unsigned magic, version; int blocking; } config_t_;
static int is(const char* mode) { const char* set = getenv("MODE"); return set && !strcmp(set, mode); }
static void note(const char* format, ...) {
  FILE* file = fopen(getenv("NOTES"), "a");
  va_list list; va_start(list, format); vfprintf(file, format, list); va_end(list);
  fclose(file);
}
int ncclGetUniqueId(id_t_* id) { for (int i = 0; i < 128; i++) id->bytes[i] = (char)(i + 1); return 0; }
int ncclCommInitRankConfig(void** out, int n, id_t_ id, int rank, config_t_* config) {
  int fits = 1;
  for (int i = 0; i < 128; i++) fits &= id.bytes[i] == (char)(i + 1);
  comm_t_* comm = calloc(1, sizeof *comm);
  comm->rank = rank; comm->looks = 1; *out = comm;
  note("%d: init %d of %d, id %d, config %zu %x %u %d\n", rank, rank, n, fits, config->size, config->magic, config->version, config->blocking);
  return 7;
}
int ncclCommGetAsyncError(comm_t_* comm, int* state) {
  *state = is("remote") && comm->used ? 6 : comm->looks-- > 0 ? 7 : 0;
  return 0;
}
int ncclCommFinalize(comm_t_* comm) { note("%d: finalize\n", comm->rank); comm->looks = 1; return 7; }
int ncclCommDestroy(comm_t_* comm) { note("%d: destroy\n", comm->rank); return 0; }
int ncclCommAbort(comm_t_* comm) { note("%d: abort\n", comm->rank); return 0; }
const char* ncclGetErrorString(int code) { return code == 6 ? "remote process exited or there was a network error" : "invalid usage"; }
const char* ncclGetLastError(void* comm) { return "socketProgress: Connection closed by remote peer"; }
static int called(const char* what, const char* from, char* to, size_t count, int dtype, int extra, comm_t_* comm, int* stream) {
  comm->looks = 1; comm->used = 1;
  note("%d: %s of %zu, dtype %d, %d, from %td, stream %d\n", comm->rank, what, count, dtype, extra, from - to, *stream);
  *stream %= 100;
  return is("refuse") ? 5 : 7;
}
int ncclAllReduce(const void* from, void* to, size_t n, int dtype, int op, comm_t_* comm, int* stream) { return called("all_reduce", from, to, n, dtype, op, comm, stream); }
int ncclReduceScatter(const void* from, void* to, size_t n, int dtype, int op, comm_t_* comm, int* stream) { return called("reduce_scatter", from, to, n, dtype, op, comm, stream); }
int ncclAllGather(const void* from, void* to, size_t n, int dtype, comm_t_* comm, int* stream) { return called("all_gather", from, to, n, dtype, 0, comm, stream); }
int ncclBroadcast(const void* from, void* to, size_t n, int dtype, int root, comm_t_* comm, int* stream) { return called("broadcast", from, to, n, dtype, root, comm, stream); }
int cudaSetDevice(int device) { return 0; }
int cudaStreamCreateWithFlags(int** stream, unsigned flags) { *stream = malloc(sizeof(int)); **stream = 40 + flags; return 0; }
int cudaStreamDestroy(int* stream) { free(stream); return 0; }
int cudaEventCreateWithFlags(int** event, unsigned flags) { *event = calloc(1, sizeof(int)); return flags == 2 ? 0 : 1; }
int cudaEventDestroy(int* event) { free(event); return 0; }
/* A stream that waits for torch's, which is the default one, counts a hundred more until its next operation. */
int cudaEventRecord(int* event, void* stream) { *event = stream ? 1 : 100; return 0; }
int cudaStreamWaitEvent(int* stream, int* event, unsigned flags) { *stream += *event; return flags; }
int cudaEventQuery(int* event) { return is("hang") || (*event)-- > 0 ? 600 : 0; }
const char* cudaGetErrorString(int code) { return "a CUDA error"; }
"#;

/// What a process with the stand-in does: two ranks on threads.
#[test]
fn ranks_of_another_process() {
    let Ok(mode) = std::env::var("MODE") else { return };
    let works = |result: Result<()>| result.unwrap();
    let n_ranks = 2;
    let rendezvous = Rendezvous::listen(Place::LOOPBACK, n_ranks, b"token", LONG).unwrap();
    let rank = |rank| {
        let address = rendezvous.address().to_string();
        let (interface, token) = (Place::LOOPBACK, b"token".to_vec());
        let (deadline, timeout, link_timeout) = (LONG, LONG, Place::LINK_TIMEOUT);
        let place = Place {
            rank,
            world_size: n_ranks,
            address,
            interface,
            token,
            deadline,
            timeout,
            link_timeout,
            came: Arc::default(),
        };
        let tcp = Tcp::join(&place).unwrap();
        let made = Nccl::new(tcp, Device::Cpu, if mode == "hang" { SHORT } else { LONG });
        if mode == "absent" {
            let fault = fault(made.map(|_| ()));
            assert!(fault.what.contains("libnccl.so.2") && fault.hint.contains("LD_LIBRARY_PATH"), "{fault}");
            return;
        }
        let mut comm = made.unwrap();
        let tensor = Tensor::ones([10], (Kind::Float, Device::Cpu));
        let name = format!("rank {rank} of 2, ");
        match mode.as_str() {
            "works" => {
                works(comm.all_reduce(&tensor));
                works(comm.reduce_scatter(&tensor.to_kind(Kind::Double)));
                works(comm.all_gather(&tensor));
                works(comm.broadcast(&tensor.to_kind(Kind::Int64), 1));
                works(comm.broadcast(&tensor.to_kind(Kind::Uint8), 0));
                works(comm.all_gather(&tensor.to_kind(Kind::Uint8)));
                works(comm.all_reduce(&tensor.narrow(0, 0, 0)));
                assert!(fault(comm.all_reduce(&tensor.to_kind(Kind::Int64))).what.contains("tensors of Int64"));
                assert!(fault(comm.all_gather(&tensor.narrow(0, 0, 9))).what.contains("not 2 equal parts"));
                works(comm.wait());
                works(comm.barrier());
                assert_eq!((comm.rank(), comm.world_size(), comm.sent_bytes()), (rank, 2, 40 + 40 + 20 + 40 + 5 + 5));
            }
            "hang" => {
                works(comm.all_reduce(&tensor));
                let first = fault(comm.wait());
                assert_eq!(first.place, name + "the operations up to operation 1");
                assert!(first.what.starts_with("is not done after 0.4 s: another rank hangs"), "{first}");
                assert_eq!(fault(comm.all_reduce(&tensor)), first);
            }
            "remote" => {
                let fault = fault(comm.all_reduce(&tensor));
                assert_eq!(fault.place, name + "operation 1");
                let said =
                    "NCCL's operation: remote process exited or there was a network error: socketProgress: Connection";
                assert!(fault.what.starts_with(said) && fault.hint.contains("other ranks' logs"), "{fault}");
            }
            _ => {
                let fault = fault(comm.all_reduce(&tensor));
                assert!(fault.what.starts_with("NCCL's all_reduce: invalid usage: "), "{fault}");
                assert!(fault.hint.contains("CUDA_VISIBLE_DEVICES"), "{}", fault.hint);
            }
        }
    };
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|at| scope.spawn(move || rank(at)));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[track_caller]
fn fault(result: Result<()>) -> Fault {
    match result {
        Err(Error::Failed(fault) | Error::Lost(fault)) => fault,
        other => panic!("{other:?}"),
    }
}

/// Runs the two ranks with what lies in a folder as `libnccl.so.2`; what was noted, in the order of the ranks.
fn run(dir: &Path, mode: &str) -> Vec<String> {
    let notes = dir.join(mode);
    let mut process = Command::new(std::env::current_exe().unwrap());
    process.args(["--exact", "nccl::ranks_of_another_process", "--nocapture"]);
    // Before libtorch's own CUDA runtime, which may be in the process too.
    if mode != "absent" {
        process.env("LD_PRELOAD", dir.join("libnccl.so.2"));
    }
    let output = process.env("LD_LIBRARY_PATH", dir).env("MODE", mode).env("NOTES", &notes).output().unwrap();
    assert!(output.status.success(), "{mode}: {}", String::from_utf8_lossy(&output.stderr));
    let noted = std::fs::read_to_string(notes).unwrap_or_default();
    let of = |rank: usize| noted.lines().filter(move |line| line.starts_with(&format!("{rank}: "))).map(String::from);
    of(0).chain(of(1)).collect()
}

#[test]
fn nccl_is_called_as_its_header_says_and_its_errors_come_out() {
    let dir = tempfile::tempdir().unwrap();
    let library = dir.path().join("libnccl.so.2");
    std::fs::write(&library, "no library").unwrap();
    assert!(run(dir.path(), "absent").is_empty());

    let source = dir.path().join("nccl.c");
    std::fs::write(&source, STAND_IN).unwrap();
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));

    // Stream 41: one that does not wait for the default stream by itself. `from` counts from where the result goes, in bytes.
    let calls = |rank: usize, own: isize| {
        [
            format!("init {rank} of 2, id 1, config 24 cafebeef 21400 0"),
            "all_reduce of 10, dtype 7, 0, from 0, stream 141".into(),
            format!("reduce_scatter of 5, dtype 8, 0, from {}, stream 141", -2 * own),
            format!("all_gather of 5, dtype 7, 0, from {own}, stream 141"),
            "broadcast of 10, dtype 4, 1, from 0, stream 141".into(),
            "broadcast of 10, dtype 1, 0, from 0, stream 141".into(),
            format!("all_gather of 5, dtype 1, 0, from {}, stream 141", own / 4),
            "finalize".into(),
            "destroy".into(),
        ]
        .map(|line| format!("{rank}: {line}"))
    };
    assert_eq!(run(dir.path(), "works"), [calls(0, 0), calls(1, 20)].concat());
    for mode in ["hang", "remote", "refuse"] {
        let noted = run(dir.path(), mode);
        let last = |rank: usize| noted.iter().rfind(|line| line.starts_with(&format!("{rank}: "))).unwrap();
        assert_eq!([last(0), last(1)], ["0: abort", "1: abort"], "{mode}: {noted:?}");
    }
}
