//! What torchrun, mpirun or srun say in the environment of a process: which rank it is, of how many.

use crate::error::{Error, Result};

/// What variables of another program say of this process's place.
pub(super) struct Claim {
    pub(super) rank_name: &'static str,
    pub(super) rank: usize,
    pub(super) world_name: &'static str,
    pub(super) world_size: usize,
    local_name: &'static str,
}

impl Claim {
    /// The variables of a rank, of the world's size and of the rank among those of its machine: torchrun's (or set by hand),
    /// Open MPI's, those of PMI (MPICH, Intel MPI), SLURM's. The innermost program comes first: mpirun and torchrun run within
    /// an allocation of SLURM.
    const NAMES: [[&'static str; 3]; 4] = [
        ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
        ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"],
        ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"],
        ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"],
    ];

    /// The innermost claim there is.
    ///
    /// # Errors
    /// Variables that hold no numbers or ranks out of range; two programs of which each says that the job is its own.
    pub(super) fn of_environment() -> Result<Option<Self>> {
        let claims = Self::NAMES.into_iter().filter_map(|names| Self::read(names).transpose());
        let claims = claims.collect::<Result<Vec<Self>>>()?;
        let Some((first, others)) = claims.split_first() else {
            return Self::is_not_half().map(|()| None);
        };
        // torchrun and mpirun are often started by srun, whose tasks are then machines.
        let is_within = |other: &Self| {
            other.rank_name == "SLURM_PROCID"
                && (first.rank_name != "RANK" || variable("TORCHELASTIC_RUN_ID").is_some())
        };
        let differs = |other: &&Self| other.world_size != first.world_size && !is_within(other);
        if let Some(other) = others.iter().find(differs) {
            let what = format!(
                "says that the job has {} ranks, and {} says {}",
                first.world_size, other.world_name, other.world_size
            );
            return Err(Error::invalid(first.world_name, what).hint(format!(
                "unset {} and {}, or {} and {}, whichever did not start this job",
                first.rank_name, first.world_name, other.rank_name, other.world_name
            )));
        }
        let rank_is_of_srun = first.rank_name == "SLURM_PROCID";
        if rank_is_of_srun && first.world_size > 1 && !is_task_of_srun() {
            let what = format!(
                "says that this is rank {} of {}, but SLURM_STEP_ID names no step of srun: it is the batch script, or a shell, \
                 that runs here, and the other ranks would never come",
                first.rank, first.world_size
            );
            return Err(Error::invalid(first.rank_name, what).hint(
                "write `srun bellora train ...`, or give --nproc for ranks on this machine (--nproc 1: no others)",
            ));
        }
        Ok(claims.into_iter().next())
    }

    /// Refuses one variable of the pair that people set by hand without the other.
    fn is_not_half() -> Result<()> {
        let [rank, world, _] = Self::NAMES[0];
        let (given, missing) = match (variable(rank), variable(world)) {
            (Some(_), None) => (rank, world),
            (None, Some(size)) if size != "1" => (world, rank),
            _ => return Ok(()),
        };
        let what = format!("is not set, and {given} is: one rank of several would train alone");
        Err(Error::invalid(missing, what).hint(format!("set both, or unset {given}")))
    }

    /// Whether no other rank of the job runs on this machine before it, as far as what started them says so.
    pub(super) fn is_first_of_machine(&self) -> bool {
        variable(self.local_name).is_none_or(|local| local == "0")
    }

    fn read([rank_name, world_name, local_name]: [&'static str; 3]) -> Result<Option<Self>> {
        let Some((rank, world_size)) = variable(rank_name).zip(variable(world_name)) else { return Ok(None) };
        let number = |name: &str, text: &str| -> Result<usize> {
            text.parse().map_err(|_| {
                let hint = "unset it where no other program starts the ranks";
                Error::invalid(name, format!("expected a number, found {text:?}")).hint(hint)
            })
        };
        let (rank, world_size) = (number(rank_name, &rank)?, number(world_name, &world_size)?);
        if rank >= world_size {
            let what = format!("expected less than {world_name} {world_size}, found {rank}");
            return Err(Error::invalid(rank_name, what).hint("ranks count from 0: see what starts them"));
        }
        Ok(Some(Self { rank_name, rank, world_name, world_size, local_name }))
    }
}

/// Whether this process is a task that srun has started to run with others. Numbers of steps from 0xfffffff0 on are no such
/// steps: the batch script, an interactive shell, what waits beside the tasks.
fn is_task_of_srun() -> bool {
    const FIRST_OF_ANOTHER_KIND: u32 = 0xffff_fff0;
    let step = variable("SLURM_STEP_ID").or_else(|| variable("SLURM_STEPID"));
    step.and_then(|step| step.parse::<u32>().ok()).is_some_and(|step| step < FIRST_OF_ANOTHER_KIND)
}

/// A variable of the environment that holds something.
pub(super) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
