//! Collectives between ranks: threads of this process over loopback, each with its own connections. Sums are held against
//! the plain sum in rank order, bit for bit; every fault of a rank and of the rendezvous against what is said of it.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::Barrier;
use std::time::Duration;

use bellora::comm::{Communicator, Place, Rendezvous, Solo, Tcp};
use bellora::error::{Error, Fault, Result};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use tch::{Device, Kind, Tensor};

const TOKEN: &[u8] = b"a token for tests";
const LOOPBACK: IpAddr = Place::LOOPBACK;
/// For what is expected to happen at once; a machine that is this slow fails the test.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(400);

fn place(rank: usize, world_size: usize, address: impl ToString) -> Place {
    Place {
        rank,
        world_size,
        address: address.to_string(),
        interface: LOOPBACK,
        token: TOKEN.to_vec(),
        deadline: LONG,
        timeout: LONG,
        link_timeout: Place::LINK_TIMEOUT,
        came: Arc::default(),
    }
}

fn listen(world_size: usize, deadline: Duration) -> Rendezvous {
    Rendezvous::listen(LOOPBACK, world_size, TOKEN, deadline).unwrap()
}

/// Calls `each` with the places of ranks, one thread each, and gives what they return in the order of the places.
fn on_threads<R: Send>(places: Vec<Place>, each: impl Fn(Place) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = places.into_iter().map(|place| scope.spawn(|| each(place))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A job of ranks that have met; `timeout` is that of a collective.
fn job<R: Send>(world_size: usize, timeout: Duration, each: impl Fn(usize, Tcp) -> R + Sync) -> Vec<R> {
    let rendezvous = listen(world_size, LONG);
    let places = (0..world_size).map(|rank| Place { timeout, ..place(rank, world_size, rendezvous.address()) });
    let ends = on_threads(places.collect(), |place| each(place.rank, Tcp::join(&place).unwrap()));
    rendezvous.finish().unwrap();
    ends
}

#[track_caller]
fn fault<T>(result: Result<T>) -> Fault {
    match result.map(|_| ()) {
        Err(Error::Failed(fault) | Error::Lost(fault)) => fault,
        Err(Error::Invalid(mut faults)) if faults.len() == 1 => faults.remove(0),
        other => panic!("{other:?}"),
    }
}

/// Checks what a fault says, and that it says how to mend it.
#[track_caller]
fn assert_says(fault: &Fault, words: &[&str]) {
    let said = fault.to_string();
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    assert!(!fault.hint.is_empty(), "no hint: {said}");
}

/// Numbers of very different sizes, so that sums in another order differ.
fn numbers(n: usize, kind: Kind) -> Tensor {
    let options = (Kind::Double, Device::Cpu);
    (Tensor::randn([n as i64], options) * (Tensor::randn([n as i64], options) * 4.0).exp()).to_kind(kind)
}

fn sum(tensors: &[Tensor]) -> Tensor {
    tensors[1..].iter().fold(tensors[0].copy(), |sum, tensor| sum + tensor)
}

#[track_caller]
fn assert_same_bits(what: &str, ours: &Tensor, judge: &Tensor) {
    assert_eq!((ours.kind(), ours.size()), (judge.kind(), judge.size()), "{what}");
    if ours.numel() > 0 {
        assert_eq!(bellora::torch::bytes(ours), bellora::torch::bytes(&judge.contiguous()), "{what}");
    }
}

/// The part of a tensor of equal parts that a rank owns.
fn own(tensor: &Tensor, rank: usize, world_size: usize) -> Tensor {
    let len = tensor.size()[0] / world_size as i64;
    tensor.narrow(0, rank as i64 * len, len)
}

/// Every operation on tensors of one size, all of them queued at once.
fn check_operations(world_size: usize, n: usize, kind: Kind) {
    let inputs: Vec<Tensor> = (0..world_size).map(|_| numbers(n, kind)).collect();
    let wide: Vec<Tensor> = (0..world_size).map(|_| numbers(n * world_size, kind)).collect();
    let bytes: Vec<Tensor> = wide.iter().map(|tensor| tensor.to_kind(Kind::Int64)).collect();
    let copies = |tensors: &[Tensor]| tensors.iter().map(Tensor::copy).collect::<Vec<_>>();
    let given: Vec<_> =
        (0..world_size).map(|rank| (copies(&inputs[rank..=rank]), copies(&wide[rank..=rank]))).collect();
    let given: Vec<_> = given.into_iter().zip(bytes.iter().map(Tensor::copy)).map(std::sync::Mutex::new).collect();
    let root = world_size - 1;
    let ends = job(world_size, LONG, |rank, mut comm| {
        assert_eq!((comm.rank(), comm.world_size()), (rank, world_size));
        let given = given[rank].lock().unwrap();
        let ((input, wide), bytes) = &*given;
        let (reduced, scattered) = (input[0].copy(), wide[0].copy());
        let (gathered, sent, counted) = (wide[0].copy(), input[0].copy(), bytes.copy());
        comm.all_reduce(&reduced).unwrap();
        comm.reduce_scatter(&scattered).unwrap();
        comm.all_gather(&gathered).unwrap();
        comm.broadcast(&sent, root).unwrap();
        comm.broadcast(&counted, 0).unwrap();
        comm.wait().unwrap();
        comm.barrier().unwrap();
        (reduced, scattered, gathered, sent, counted)
    });
    let what = |op: &str, rank: usize| format!("{op} of {n} {kind:?} at rank {rank} of {world_size}");
    let (plain, plain_wide) = (sum(&inputs), sum(&wide));
    let parts: Vec<Tensor> = (0..world_size).map(|rank| own(&wide[rank], rank, world_size)).collect();
    let whole = Tensor::cat(&parts, 0);
    for (rank, (reduced, scattered, gathered, sent, counted)) in ends.iter().enumerate() {
        assert_same_bits(&what("all_reduce", rank), reduced, &plain);
        let (ours, judge) = (own(scattered, rank, world_size), own(&plain_wide, rank, world_size));
        assert_same_bits(&what("reduce_scatter", rank), &ours, &judge);
        assert_same_bits(&what("all_gather", rank), gathered, &whole);
        assert_same_bits(&what("broadcast", rank), sent, &inputs[root]);
        assert_same_bits(&what("broadcast of i64", rank), counted, &bytes[0]);
    }
    if world_size > 2 && n > 100 {
        let backwards: Vec<Tensor> = inputs.iter().rev().map(Tensor::shallow_clone).collect();
        assert!(!sum(&backwards).equal(&plain), "the order of these sums shows");
    }
}

#[test]
fn sums_are_those_in_rank_order_bit_for_bit() {
    for world_size in [1, 2, 3, 4, 8] {
        for n in [0, 1, world_size - 1, world_size + 1, 1001] {
            check_operations(world_size, n, Kind::Float);
        }
        check_operations(world_size, 1001, Kind::Double);
    }
}

/// Several pieces a part, far more than the system's socket buffers hold, and a last piece that is short.
#[test]
fn large_tensors_go_in_pieces_both_ways_at_once() {
    check_operations(2, 1_500_007, Kind::Float);
    check_operations(3, 700_003, Kind::Double);
    check_operations(8, 300_001, Kind::Float);
}

#[test]
fn a_queue_of_mixed_operations_gives_the_same_bits_every_time() {
    let inputs: Vec<Vec<Tensor>> =
        (0..3).map(|_| (0..20).map(|i| numbers(3 * (i * i * 97 % 501), Kind::Float)).collect()).collect();
    let judge = |rank: usize| {
        let tensors: Vec<Vec<Tensor>> = inputs.iter().map(|of| of.iter().map(Tensor::copy).collect()).collect();
        for i in 0..20 {
            let all: Vec<Tensor> = tensors.iter().map(|of| of[i].shallow_clone()).collect();
            let total = sum(&all);
            match i % 4 {
                0 => all.iter().for_each(|tensor| tensor.shallow_clone().copy_(&total)),
                1 => own(&all[rank], rank, 3).copy_(&own(&total, rank, 3)),
                2 => {
                    let whole = Tensor::cat(&(0..3).map(|r| own(&all[r], r, 3)).collect::<Vec<_>>(), 0);
                    all.iter().for_each(|tensor| tensor.shallow_clone().copy_(&whole));
                }
                _ => {
                    let root = all[i % 3].copy();
                    all.iter().for_each(|tensor| tensor.shallow_clone().copy_(&root));
                }
            }
        }
        tensors.into_iter().nth(rank).unwrap()
    };
    let places = inputs.iter().map(|of| std::sync::Mutex::new(of.iter().map(Tensor::copy).collect::<Vec<_>>()));
    let places: Vec<_> = places.collect();
    for _ in 0..2 {
        let ends = job(3, LONG, |rank, mut comm| {
            let tensors: Vec<Tensor> = places[rank].lock().unwrap().iter().map(Tensor::copy).collect();
            for (i, tensor) in tensors.iter().enumerate() {
                match i % 4 {
                    0 => comm.all_reduce(tensor).unwrap(),
                    1 => comm.reduce_scatter(tensor).unwrap(),
                    2 => comm.all_gather(tensor).unwrap(),
                    _ => comm.broadcast(tensor, i % 3).unwrap(),
                }
                if i == 11 {
                    comm.barrier().unwrap();
                }
            }
            comm.wait().unwrap();
            tensors
        });
        for (rank, ours) in ends.iter().enumerate() {
            for (i, (ours, judge)) in ours.iter().zip(judge(rank)).enumerate() {
                let (ours, judge) = match i % 4 {
                    // The other parts hold anything.
                    1 => (own(ours, rank, 3), own(&judge, rank, 3)),
                    _ => (ours.shallow_clone(), judge),
                };
                assert_same_bits(&format!("operation {i} at rank {rank}"), &ours, &judge);
            }
        }
    }
}

#[test]
fn what_is_sent_is_counted() {
    let ends = job(4, LONG, |_, mut comm| {
        let tensor = Tensor::ones([4000], (Kind::Float, Device::Cpu));
        comm.all_reduce(&tensor).unwrap();
        comm.wait().unwrap();
        let after_sum = comm.sent_bytes();
        comm.barrier().unwrap();
        (after_sum, comm.sent_bytes())
    });
    // To each of three: an announcement, and a quarter of the tensor in both movements, each frame with its header.
    let sum = 3 * (28 + 2 * (28 + 4000));
    assert_eq!(ends, [(sum, sum + 3 * 28); 4]);
}

#[test]
fn one_rank_alone_has_nothing_to_do() {
    let mut comm = Solo;
    let tensor = numbers(10, Kind::Float);
    let before = tensor.copy();
    comm.all_reduce(&tensor).unwrap();
    comm.reduce_scatter(&tensor).unwrap();
    comm.all_gather(&tensor).unwrap();
    comm.broadcast(&tensor, 0).unwrap();
    comm.wait().unwrap();
    comm.barrier().unwrap();
    assert_eq!((comm.rank(), comm.world_size(), comm.sent_bytes()), (0, 1, 0));
    assert_same_bits("alone", &tensor, &before);
    assert!(fault(comm.broadcast(&tensor, 1)).what.contains("rank 1 is to send, but there are only 1 ranks"));
}

/// What is only copied need not be numbers that can be added up.
#[test]
fn bytes_are_gathered_as_they_are() {
    job(3, LONG, |rank, mut comm| {
        let parts: Vec<u8> = (0..6).map(|at| if at / 2 == rank { 250 + at as u8 } else { 0 }).collect();
        let bytes = Tensor::from_slice(&parts);
        comm.all_gather(&bytes).unwrap();
        comm.wait().unwrap();
        assert_eq!(Vec::<u8>::try_from(bytes).unwrap(), [250, 251, 252, 253, 254, 255]);
    });
}

#[test]
fn tensors_that_do_not_fit_are_refused_and_nothing_is_lost() {
    job(2, LONG, |_, mut comm| {
        let wide = Tensor::ones([4, 4], (Kind::Float, Device::Cpu));
        assert!(fault(comm.all_reduce(&wide.narrow(1, 0, 2))).what.contains("contiguous tensors of a CPU"));
        let ids = Tensor::from_slice(&[1i64, 2]);
        for result in [comm.all_reduce(&ids), comm.reduce_scatter(&ids)] {
            assert!(fault(result).what.contains("does not take tensors of Int64"));
        }
        assert!(fault(comm.broadcast(&wide.to_kind(Kind::Half), 0)).what.contains("does not take tensors of Half"));
        let three = Tensor::ones([3], (Kind::Float, Device::Cpu));
        for result in [comm.all_gather(&three), comm.reduce_scatter(&three)] {
            assert!(fault(result).what.contains("3 elements are not 2 equal parts"));
        }
        assert!(fault(comm.broadcast(&three, 2)).what.contains("there are only 2 ranks"));
        comm.all_reduce(&three).unwrap();
        comm.wait().unwrap();
        assert_eq!(three.sum(Kind::Float).double_value(&[]), 6.0);
    });
}

fn ten() -> Tensor {
    Tensor::ones([10], (Kind::Float, Device::Cpu))
}

#[test]
fn a_rank_that_leaves_between_operations_is_named() {
    let ends = job(3, LONG, |rank, mut comm| {
        let tensor = ten();
        comm.all_reduce(&tensor).unwrap();
        comm.broadcast(&tensor, 0).unwrap();
        comm.wait().unwrap();
        if rank == 1 {
            return None;
        }
        comm.all_reduce(&tensor).unwrap();
        let first = fault(comm.wait());
        // It comes again, whatever is called.
        assert_eq!(fault(comm.barrier()), first);
        assert_eq!(fault(comm.all_reduce(&tensor)), first);
        Some(first)
    });
    for rank in [0, 2] {
        let fault = ends[rank].as_ref().unwrap();
        assert_eq!(fault.place, format!("rank {rank} of 3, operation 3 (all_reduce of 10 fp32)"));
        // Either it was seen, or another rank that saw it first told.
        assert_says(fault, &["rank 1 has left the job after operation 2 (broadcast of 10 fp32 from rank 0)"]);
    }
}

#[test]
fn a_rank_that_leaves_in_the_middle_of_an_operation_is_named() {
    let left = Barrier::new(2);
    let ends = job(3, LONG, |rank, mut comm| {
        let tensor = numbers(1 << 20, Kind::Float);
        comm.barrier().unwrap();
        match rank {
            // Rank 1 is not there yet, so rank 2 leaves something undone.
            2 => {
                comm.all_reduce(&tensor).unwrap();
                drop(comm);
                left.wait();
                return None;
            }
            1 => drop(left.wait()),
            _ => {}
        }
        // Where it is known by now, the call itself says so.
        Some(fault(comm.all_reduce(&tensor).and_then(|()| comm.wait())))
    });
    for rank in [0, 1] {
        let fault = ends[rank].as_ref().unwrap();
        assert_eq!(fault.place, format!("rank {rank} of 3, operation 2 (all_reduce of 1048576 fp32)"));
        assert_says(fault, &["rank 2", "left"]);
    }
    let words = "rank 2 gave up: operation 2 (all_reduce of 1048576 fp32): it left before this operation was done";
    assert_says(ends[0].as_ref().unwrap(), &[words]);
}

/// What a process of its own does: joins as rank 1 and dies in the middle of a large sum.
#[test]
fn rank_of_another_process() {
    let Ok(address) = std::env::var("BELLORA_TEST_RENDEZVOUS") else { return };
    let mut comm = Tcp::join(&place(1, 3, address)).unwrap();
    comm.barrier().unwrap();
    comm.all_reduce(&Tensor::ones([1 << 22], (Kind::Float, Device::Cpu))).unwrap();
    std::process::abort();
}

#[test]
fn a_process_that_dies_is_named_by_all_others() {
    let rendezvous = listen(3, LONG);
    let mut process = Command::new(std::env::current_exe().unwrap());
    process.args(["--exact", "comm::rank_of_another_process", "--nocapture"]);
    process.env("BELLORA_TEST_RENDEZVOUS", rendezvous.address().to_string());
    let mut process = process.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let dead = Barrier::new(2);
    let places = [0, 2].map(|rank| place(rank, 3, rendezvous.address())).to_vec();
    let ends = std::thread::scope(|scope| {
        scope.spawn(|| {
            process.wait().unwrap();
            dead.wait();
        });
        on_threads(places, |place| {
            let mut comm = Tcp::join(&place).unwrap();
            comm.barrier().unwrap();
            if place.rank == 2 {
                dead.wait();
            }
            fault(comm.all_reduce(&Tensor::ones([1 << 22], (Kind::Float, Device::Cpu))).and_then(|()| comm.wait()))
        })
    });
    rendezvous.finish().unwrap();
    for (fault, rank) in ends.iter().zip([0, 2]) {
        assert_eq!(fault.place, format!("rank {rank} of 3, operation 2 (all_reduce of 4194304 fp32)"));
        assert_says(fault, &["rank 1 closed its connection without a word: its process died or was killed"]);
    }
}

#[test]
fn a_rank_that_does_not_answer_is_named_with_where_it_was_seen() {
    let told = Barrier::new(3);
    let ends = job(3, SHORT, |rank, mut comm| {
        let tensor = ten();
        comm.all_reduce(&tensor).unwrap();
        comm.wait().unwrap();
        let end = (rank != 1).then(|| {
            comm.all_gather(&Tensor::ones([12], (Kind::Float, Device::Cpu))).unwrap();
            fault(comm.wait())
        });
        // Rank 1 is there all the time.
        told.wait();
        end
    });
    for rank in [0, 2] {
        let fault = ends[rank].as_ref().unwrap();
        assert_eq!(fault.place, format!("rank {rank} of 3, operation 2 (all_gather of 12 fp32)"));
        let seen = "rank 1 did not answer (it was last seen in operation 1 (all_reduce of 10 fp32))";
        assert_says(fault, &["nothing has moved for 0.4 s", seen]);
    }
}

#[test]
fn ranks_that_disagree_learn_what_both_are_at() {
    type Call = fn(&mut Tcp) -> Result<()>;
    let all_reduce: Call = |comm| comm.all_reduce(&ten());
    let cases: [(Call, &str); 5] = [
        (|comm| comm.all_gather(&ten()), "operation 2 (all_gather of 10 fp32)"),
        (|comm| comm.all_reduce(&ten().narrow(0, 0, 8)), "operation 2 (all_reduce of 8 fp32)"),
        (|comm| comm.all_reduce(&ten().to_kind(Kind::Double)), "operation 2 (all_reduce of 10 fp64)"),
        (|comm| comm.broadcast(&ten(), 1), "operation 2 (broadcast of 10 fp32 from rank 1)"),
        (|comm| comm.barrier(), "operation 2 (barrier)"),
    ];
    let first = "operation 2 (all_reduce of 10 fp32)";
    for (other, shown) in cases {
        let ends = job(2, LONG, |rank, mut comm| {
            comm.barrier().unwrap();
            let call = if rank == 0 { all_reduce } else { other };
            fault(call(&mut comm).and_then(|()| comm.wait()))
        });
        for (fault, mine) in ends.iter().zip([first, shown]) {
            assert!(fault.place.ends_with(mine), "{fault}");
            assert_says(fault, &["the ranks disagree about what comes now", first, shown]);
        }
    }
    // Who sends is part of it, even where neither would wait for the other.
    let ends = job(2, LONG, |rank, mut comm| fault(comm.broadcast(&ten(), rank).and_then(|()| comm.wait())));
    assert_says(&ends[0], &["from rank 0", "from rank 1", "disagree"]);
}

#[test]
fn a_deadline_names_the_missing_ranks_to_everyone() {
    let rendezvous = listen(4, SHORT);
    let ends =
        on_threads([0, 2].map(|rank| place(rank, 4, rendezvous.address())).to_vec(), |place| fault(Tcp::join(&place)));
    let words = "2 of 4 ranks came before the deadline (0.4 s); missing: rank 1, rank 3";
    let place = format!("the rendezvous at {}", rendezvous.address());
    for fault in ends.iter().chain([&fault(rendezvous.finish())]) {
        assert_eq!(fault.place, place);
        assert_says(fault, &[words]);
    }
}

#[test]
fn the_first_deadline_of_a_rank_ends_it_for_all() {
    let rendezvous = listen(3, LONG);
    let places = [LONG, SHORT].into_iter().enumerate();
    let places = places.map(|(rank, deadline)| Place { deadline, ..place(rank, 3, rendezvous.address()) });
    for fault in on_threads(places.collect(), |place| fault(Tcp::join(&place))) {
        assert_says(&fault, &["2 of 3 ranks came before the deadline", "missing: rank 2"]);
    }
    assert_says(&fault(rendezvous.finish()), &["missing: rank 2"]);
}

#[test]
fn ranks_that_cannot_be_of_one_job_are_told_at_once() {
    for (places, words) in [
        ([(0, 3), (0, 3)], "rank 0 has come twice: from 127.0.0.1:"),
        ([(0, 3), (1, 4)], "says that the job has 4 ranks, this listener was told 3"),
        ([(0, 3), (7, 8)], "says that the job has 8 ranks, this listener was told 3"),
    ] {
        let rendezvous = listen(3, LONG);
        let places = places.map(|(rank, world_size)| place(rank, world_size, rendezvous.address()));
        // Whoever comes first, the other learns it too.
        for fault in on_threads(places.to_vec(), |place| fault(Tcp::join(&place))) {
            assert!(fault.place.starts_with("the rendezvous at 127.0.0.1:"), "{fault}");
            assert_says(&fault, &[words]);
        }
        assert_says(&fault(rendezvous.finish()), &[words]);
    }
    let wrong = Tcp::join(&place(4, 4, "127.0.0.1:1"));
    assert_eq!(wrong.as_ref().unwrap_err().exit_code(), 2);
    assert_says(&fault(wrong), &["rank 4 is out of range: a job of 4 ranks"]);
    let wrong = Tcp::join(&Place { token: Vec::new(), ..place(0, 1, "127.0.0.1:1") });
    assert_says(&fault(wrong), &["the job's token: is empty"]);
    assert!(!format!("{:?}", place(0, 1, "127.0.0.1:1")).contains(std::str::from_utf8(TOKEN).unwrap()));
}

#[test]
fn another_token_is_refused_and_the_right_ones_still_meet() {
    let rendezvous = listen(2, LONG);
    let address = rendezvous.address();
    let stranger = Place { token: b"another token".to_vec(), ..place(1, 2, address) };
    assert_says(&fault(Tcp::join(&stranger)), &["what listens there does not hold this job's token"]);
    on_threads([0, 1].map(|rank| place(rank, 2, address)).to_vec(), |place| {
        Tcp::join(&place).unwrap().barrier().unwrap()
    });
    rendezvous.finish().unwrap();
}

/// Comes to a rendezvous as a rank, by the protocol as `docs/ranks.md` has it; gone again once it is dropped.
fn come(address: SocketAddr, rank: u32, world_size: u32) -> TcpStream {
    let proof = |role: u8, nonces: &[u8], body: &[u8]| {
        let mut mac = Hmac::<Sha256>::new_from_slice(TOKEN).unwrap();
        [&[role, 1], nonces, body].into_iter().for_each(|part| mac.update(part));
        mac.finalize().into_bytes()
    };
    let mut stream = TcpStream::connect(address).unwrap();
    let (mut nonces, mut answer) = ([9; 64], [0; 72]);
    stream.write_all(&[&b"BELLORA\x02\x01"[..], &nonces[..32]].concat()).unwrap();
    stream.read_exact(&mut answer).unwrap();
    nonces[32..].copy_from_slice(&answer[8..40]);
    assert_eq!((&answer[..8], &answer[40..]), (&b"BELLORA\x02"[..], &proof(1, &nonces, &[])[..]));
    let mut hello = [0; 30];
    for (at, number) in [rank, world_size, 60_000].into_iter().enumerate() {
        hello[4 * at..4 * at + 4].copy_from_slice(&number.to_le_bytes());
    }
    stream.write_all(&[&hello[..], &proof(2, &nonces, &hello)].concat()).unwrap();
    stream
}

#[test]
fn a_rank_that_comes_and_goes_has_no_seat() {
    let rendezvous = listen(2, LONG);
    let address = rendezvous.address();
    drop(come(address, 1, 2));
    on_threads([0, 1].map(|rank| place(rank, 2, address)).to_vec(), |place| {
        Tcp::join(&place).unwrap().barrier().unwrap()
    });
    rendezvous.finish().unwrap();

    let rendezvous = listen(2, SHORT);
    drop(come(rendezvous.address(), 1, 2));
    let words = "0 of 2 ranks came before the deadline (0.4 s); missing: rank 0, rank 1 (came and went again)";
    assert_says(&fault(rendezvous.finish()), &[words]);
}

#[test]
fn a_rendezvous_that_is_called_off_says_so() {
    let rendezvous = listen(2, LONG);
    let mut waiting = come(rendezvous.address(), 0, 2);
    drop(rendezvous);
    let mut said = Vec::new();
    waiting.read_to_end(&mut said).unwrap();
    assert!(String::from_utf8_lossy(&said).contains("was called off by who listened there"), "{said:?}");
}

#[test]
fn strangers_do_not_hold_up_the_meeting_of_the_ranks() {
    let rendezvous = listen(2, LONG);
    let address = rendezvous.address();
    let connect = || TcpStream::connect(address).unwrap();
    let silent = connect();
    let mut garbage = connect();
    garbage.write_all(&[0x55; 4096]).unwrap();
    drop(connect());
    // Half a call; a whole one, after which nothing comes; one whose hello proves nothing.
    let mut half = connect();
    half.write_all(b"BELLORA\x02\x01").unwrap();
    let call = [&b"BELLORA\x02\x01"[..], &[7; 32]].concat();
    let mut whole = connect();
    whole.write_all(&call).unwrap();
    let mut unproven = connect();
    unproven.write_all(&call).unwrap();
    unproven.read_exact(&mut [0; 72]).unwrap();
    unproven.write_all(&[1; 62]).unwrap();
    assert_eq!(unproven.read(&mut [0]).unwrap_or(0), 0, "it is shown out");
    on_threads([0, 1].map(|rank| place(rank, 2, address)).to_vec(), |place| {
        Tcp::join(&place).unwrap().barrier().unwrap()
    });
    rendezvous.finish().unwrap();
    drop((silent, garbage, half, whole));

    let rendezvous = listen(1, SHORT);
    let mut garbage = TcpStream::connect(rendezvous.address()).unwrap();
    garbage.write_all(&[0x55; 64]).unwrap();
    drop(TcpStream::connect(rendezvous.address()).unwrap());
    assert_says(
        &fault(rendezvous.finish()),
        &["missing: rank 0; 2 connections did not prove that they belong to the job"],
    );
}

/// A listener that takes one connection, says something and holds the connection until it is closed from there.
fn impostor(says: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(says);
        while matches!(stream.read(&mut [0; 64]), Ok(1..)) {}
    });
    address
}

#[test]
fn what_is_no_rendezvous_is_told_from_one_within_the_deadline() {
    let try_at = |address: String| fault(Tcp::join(&Place { deadline: SHORT, ..place(0, 1, address) }));
    // A port that was free a moment ago.
    let free = TcpListener::bind((LOOPBACK, 0)).unwrap().local_addr().unwrap();
    assert_says(&try_at(free.to_string()), &[&free.to_string(), "cannot be reached within 0.4 s", "refused"]);
    assert_says(&try_at("nowhere.invalid:29500".into()), &["nowhere.invalid:29500", "cannot be resolved"]);
    assert_says(&try_at("127.0.0.1".into()), &["cannot be resolved"]);
    let http = b"HTTP/1.1 400 Bad Request\r\nServer: something else\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    assert_says(&try_at(impostor(http).to_string()), &["what listens there is no rank or launcher of bellora"]);
    let other_version = b"BELLORA\x63aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    assert_says(
        &try_at(impostor(other_version).to_string()),
        &["speaks version 99 of the protocol, this rank version 2"],
    );
    assert_says(&try_at(impostor(b"").to_string()), &["said nothing until the deadline"]);
}

#[test]
fn rank_0_leads_a_job_without_a_launcher() {
    // A port that was free a moment ago; the others call until rank 0 listens.
    let free = TcpListener::bind((LOOPBACK, 0)).unwrap().local_addr().unwrap();
    on_threads((0..3).map(|rank| place(rank, 3, free)).collect(), |place| {
        let mut comm = match place.rank {
            0 => {
                // The others come first.
                std::thread::sleep(SHORT);
                Tcp::lead(&place).unwrap()
            }
            _ => Tcp::join(&place).unwrap(),
        };
        let tensor = ten();
        comm.all_reduce(&tensor).unwrap();
        comm.wait().unwrap();
        assert_eq!(tensor.double_value(&[9]), 3.0);
    });
    let taken = TcpListener::bind((LOOPBACK, 0)).unwrap();
    let address = taken.local_addr().unwrap();
    let in_use = fault(Tcp::lead(&place(0, 2, address)));
    assert_eq!(in_use.place, address.to_string());
    assert_says(&in_use, &["cannot listen there", "in use"]);
    assert_says(&fault(Tcp::lead(&place(0, 2, "host"))), &["names no port"]);
    let elsewhere = "192.0.2.1".parse().unwrap();
    let fault = fault(Rendezvous::listen(elsewhere, 2, TOKEN, LONG));
    assert_says(&fault, &["192.0.2.1", "cannot listen there"]);
}
