//! The numbers that decide an update. They stay on the device, so that nothing in a step waits for it: whether the
//! gradients are finite, the factor that clips them, the learning rate, the loss scale of the next update.
//!
//! The host counts steps; the device counts updates, since it alone knows at once whether one was skipped. The host
//! reads the outcome later ([`Outcome`]).

use tch::{Device, Kind, Tensor};

use crate::engine::optim::loss_scale::{GROWTH_INTERVAL, LARGEST, LossScale, SMALLEST};
use crate::engine::optim::schedule::LrSchedule;
use crate::error::Result;
use crate::ops::cross_entropy::ScaledLoss;
use crate::torch::number::{WithNumber, filled};
use crate::torch::transfer::{Arriving, upload};
use crate::torch::{self};

/// Learning rates that are on the device at a time.
const RATES_AT_ONCE: u64 = 4096;

/// What ranks may ask of each other: counts of the kinds of requests, whatever these are.
pub type Asks = [f64; N_ASKS];

const N_ASKS: usize = 4;

/// Where they stand among the numbers that ranks share: behind the loss and the squared norm.
const FIRST_ASK: i64 = 2;
/// Where the count of ranks stands whose memory ran out: behind what is asked.
const OUT_OF_MEMORY: i64 = FIRST_ASK + N_ASKS as i64;

/// The control block of a run.
#[derive(Debug)]
pub struct StepControl {
    /// The loss of the present update, and the scale it carries.
    pub loss: ScaledLoss,
    /// The loss, the squared norm of the gradients, what is asked, and whether memory ran out: `[7]` fp64, to be summed over
    /// the ranks before an update is decided.
    pub shared: Tensor,
    /// The second of them.
    squares: Tensor,
    /// The last of them.
    out_of_memory: Tensor,
    /// 1, 0-d fp64, made while there is memory.
    one: Tensor,
    dynamic: bool,
    max_grad_norm: f64,
    schedule: LrSchedule,
    /// Updates applied, 0-d fp64.
    updates: Tensor,
    /// Good updates since the scale last changed, 0-d fp64.
    good_updates: Tensor,
    rates: Rates,
}

/// The learning rates of some consecutive updates.
#[derive(Debug)]
struct Rates {
    first: u64,
    lr_u: Tensor,
}

/// What an update must know, each 0-d on the device.
#[derive(Debug)]
pub struct Decision {
    /// Learning rate, in the dtype that the optimizer takes it in.
    pub lr: Tensor,
    /// The number of the update, from 1, fp32.
    pub update: Tensor,
    /// What the gradients are divided by: the loss scale over the clipping factor, fp32.
    pub grad_divisor: Tensor,
    /// 1 when a loss or gradient is not finite and nothing may change, else 0; fp32.
    pub skip: Tensor,
}

/// What became of an update, once the host knows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UpdateOutcome {
    /// The mean loss, without the scale.
    pub loss: f64,
    /// The gradient's L2 norm before clipping, without the scale.
    pub grad_norm: f64,
    /// Whether both are finite, and so whether the update was applied.
    pub is_finite: bool,
    /// The loss scale that it was computed with.
    pub loss_scale: f64,
    /// The loss scale from now on.
    pub next_scale: LossScale,
    /// What was asked, summed over the ranks.
    pub asks: Asks,
}

/// An outcome on its way to the host.
#[derive(Debug)]
pub struct Reading {
    dynamic: bool,
    numbers: Arriving,
}

impl StepControl {
    /// Gets ready for the update after `updates` applied ones; `max_grad_norm` 0 clips nothing.
    pub fn new(
        schedule: LrSchedule,
        max_grad_norm: f64,
        loss_scale: LossScale,
        updates: u64,
        device: Device,
    ) -> Result<Self> {
        let scalar = |value: f64| filled(&[], value, (Kind::Double, device));
        let shared = Tensor::f_zeros([OUT_OF_MEMORY + 1], (Kind::Double, device))?;
        Ok(Self {
            loss: ScaledLoss { scale: scalar(loss_scale.factor())?, sum: shared.f_get(0)? },
            squares: shared.f_get(1)?,
            out_of_memory: shared.f_get(OUT_OF_MEMORY)?,
            one: scalar(1.0)?,
            shared,
            dynamic: loss_scale.is_dynamic(),
            max_grad_norm,
            schedule,
            updates: scalar(updates as f64)?,
            good_updates: scalar(f64::from(loss_scale.good_updates()))?,
            rates: Rates::upload(&schedule, updates, device)?,
        })
    }

    /// Begins another update: no loss yet, and what this rank asks of all.
    pub fn begin(&mut self, asks: Asks) -> Result<()> {
        let _ = self.shared.f_zero_()?;
        // Nearly always nothing is asked, and then nothing goes to the device.
        if asks != Asks::default() {
            self.shared_asks()?.f_copy_(&upload(&asks, self.shared.device())?)?;
        }
        Ok(())
    }

    fn shared_asks(&self) -> Result<Tensor> {
        Ok(self.shared.f_narrow(0, FIRST_ASK, N_ASKS as i64)?)
    }

    /// Notes that the memory of this rank ran out, for the others to learn of. It needs no memory itself.
    pub fn note_out_of_memory(&mut self) -> Result<()> {
        self.out_of_memory.f_copy_(&self.one)?;
        Ok(())
    }

    /// Whether the memory of any rank ran out, once the numbers are summed over the ranks; waits for the device.
    pub fn is_out_of_memory(&self) -> Result<bool> {
        Ok(self.out_of_memory.f_double_value(&[])? > 0.0)
    }

    /// Takes the norm of gradients that are summed over the ranks.
    pub fn take_norm(&mut self, flat_grads: &[Tensor]) -> Result<()> {
        let _ = self.squares.f_zero_()?;
        for grads in flat_grads {
            let _ = self.squares.f_add_(&torch::sum_of_squares(grads)?)?;
        }
        Ok(())
    }

    /// Decides over the gradients of a whole update, which carry the loss scale, and gets ready for the next one.
    ///
    /// `known_updates` is what the host knows of the number of updates applied; `outstanding` steps are not known yet.
    pub fn decide(&mut self, known_updates: u64, outstanding: u64) -> Result<(Decision, Reading)> {
        let device = self.shared.device();
        if known_updates + outstanding >= self.rates.first + RATES_AT_ONCE {
            self.rates = Rates::upload(&self.schedule, known_updates, device)?;
        }
        let scale = self.loss.scale.f_detach_copy()?;
        let norm = self.squares.f_sqrt()?.f_div(&scale)?;
        let loss = self.loss.value()?;
        let is_finite = norm.f_add(&loss)?.f_isfinite()?.f_to_kind(Kind::Double)?;

        let decision = Decision {
            lr: self.rates.at(&self.updates)?,
            update: self.updates.f_plus(1.0)?.f_to_kind(Kind::Float)?,
            grad_divisor: scale.f_div(&self.clip(&norm)?)?.f_to_kind(Kind::Float)?,
            skip: is_finite.f_neg()?.f_plus(1.0)?.f_to_kind(Kind::Float)?,
        };
        let _ = self.updates.f_add_(&is_finite)?;
        if self.dynamic {
            self.rescale(&is_finite)?;
        }
        let numbers = [&loss, &norm, &is_finite, &scale, &self.loss.scale, &self.good_updates];
        let numbers = Arriving::queue(&Tensor::f_cat(&[Tensor::f_stack(&numbers, 0)?, self.shared_asks()?], 0)?)?;
        Ok((decision, Reading { dynamic: self.dynamic, numbers }))
    }

    /// The factor that clips a gradient, as PyTorch's: `max / (norm + 1e-6)`, at most 1.
    fn clip(&self, norm: &Tensor) -> Result<Tensor> {
        if self.max_grad_norm == 0.0 {
            return Ok(norm.f_ones_like()?);
        }
        norm.f_plus(1e-6)?.f_reciprocal()?.f_times(self.max_grad_norm)?.f_at_most(1.0)
    }

    /// Halves the loss scale after an overflow, doubles it after many good updates.
    fn rescale(&mut self, is_finite: &Tensor) -> Result<()> {
        let good = self.good_updates.f_plus(1.0)?.f_mul(is_finite)?;
        let is_time = good.f_is(f64::from(GROWTH_INTERVAL))?;
        let halved = self.loss.scale.f_times(0.5)?.f_at_least(SMALLEST)?;
        let doubled = self.loss.scale.f_times(2.0)?.f_at_most(LARGEST)?;
        let kept = doubled.f_where_self(&is_time, &self.loss.scale)?;
        self.loss.scale.f_copy_(&kept.f_where_self(&is_finite.f_is(1.0)?, &halved)?)?;
        good.f_fill_where_(&is_time, 0.0)?;
        self.good_updates.f_copy_(&good)?;
        Ok(())
    }
}

impl Rates {
    fn upload(schedule: &LrSchedule, first: u64, device: Device) -> Result<Self> {
        let rates: Vec<f64> = (first..first + RATES_AT_ONCE).map(|update| schedule.lr(update)).collect();
        let lr_u = upload(&rates, device)?;
        // libtorch's fused AdamW reads the rate as fp32 on a GPU.
        Ok(Self { first, lr_u: if device.is_cuda() { lr_u.f_to_kind(Kind::Float)? } else { lr_u } })
    }

    fn at(&self, updates: &Tensor) -> Result<Tensor> {
        let index = updates.f_plus(-(self.first as f64))?.f_to_kind(Kind::Int64)?.f_unsqueeze(0)?;
        Ok(self.lr_u.f_index_select(0, &index)?.f_squeeze_dim(0)?)
    }
}

impl Reading {
    /// Waits for the outcome.
    pub fn wait(self) -> Result<UpdateOutcome> {
        let numbers = Vec::<f64>::try_from(self.numbers.wait()?)?;
        let [loss, grad_norm, is_finite, loss_scale, next, good, ref asks @ ..] = numbers[..] else {
            unreachable!("six numbers and what was asked were queued");
        };
        Ok(UpdateOutcome {
            loss,
            grad_norm,
            is_finite: is_finite > 0.0,
            loss_scale,
            next_scale: LossScale::new(next, good as u32, self.dynamic),
            asks: std::array::from_fn(|kind| asks.get(kind).copied().unwrap_or_default()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::optim::schedule::Shape;

    const SCHEDULE: LrSchedule = LrSchedule { learning_rate: 1.0, shape: Shape::Linear, warmup: 0, total: 10_000 };

    fn control(loss_scale: LossScale, max_grad_norm: f64, updates: u64) -> StepControl {
        StepControl::new(SCHEDULE, max_grad_norm, loss_scale, updates, Device::Cpu).unwrap()
    }

    fn decide(control: &mut StepControl, grads: &[f32], known: u64, outstanding: u64) -> (Decision, Reading) {
        control.take_norm(&[Tensor::from_slice(grads)]).unwrap();
        control.decide(known, outstanding).unwrap()
    }

    fn number(tensor: &Tensor) -> f64 {
        tensor.double_value(&[])
    }

    #[test]
    fn clips_and_unscales_by_one_divisor() {
        let mut control = control(LossScale::new(8.0, 0, true), 1.0, 0);
        let (decision, reading) = decide(&mut control, &[24.0, 32.0], 0, 0);
        let outcome = reading.wait().unwrap();
        assert_eq!((outcome.grad_norm, outcome.loss_scale, outcome.is_finite), (5.0, 8.0, true));
        let divisor = 8.0 / (1.0 / (5.0 + 1e-6));
        assert!((number(&decision.grad_divisor) - divisor).abs() < 1e-5);
        assert_eq!((number(&decision.update), number(&decision.skip), number(&decision.lr)), (1.0, 0.0, 1.0));
    }

    #[test]
    fn an_overflow_moves_neither_the_schedule_nor_the_count_and_halves_the_scale() {
        for bad in [f32::INFINITY, f32::NAN] {
            let mut control = control(LossScale::dynamic(), 1.0, 3);
            let (decision, reading) = decide(&mut control, &[1.0, bad], 3, 0);
            assert_eq!(number(&decision.skip), 1.0);
            let outcome = reading.wait().unwrap();
            assert!(!outcome.is_finite);
            assert_eq!(outcome.next_scale.factor(), outcome.loss_scale / 2.0);
            let (again, _) = decide(&mut control, &[1.0], 3, 1);
            assert_eq!((number(&again.update), number(&again.lr)), (4.0, SCHEDULE.lr(3)));
        }
    }

    #[test]
    fn a_loss_that_is_not_finite_is_enough() {
        let mut control = control(LossScale::none(), 0.0, 0);
        let _ = control.loss.sum.fill_(f64::NAN);
        let (decision, reading) = decide(&mut control, &[1.0], 0, 0);
        assert_eq!(number(&decision.skip), 1.0);
        assert_eq!(reading.wait().unwrap().next_scale, LossScale::none());
    }

    #[test]
    fn the_scale_doubles_after_enough_good_updates_and_stays_within_its_bounds() {
        let (good, bad) = ([1.0], [f32::INFINITY]);
        let step = |control: &mut StepControl, grads: &[f32]| decide(control, grads, 0, 0).1.wait().unwrap().next_scale;
        let mut grows = control(LossScale::new(4.0, GROWTH_INTERVAL - 1, true), 0.0, 0);
        assert_eq!(step(&mut grows, &good), LossScale::new(8.0, 0, true));
        assert_eq!(step(&mut grows, &good), LossScale::new(8.0, 1, true));
        assert_eq!(step(&mut grows, &bad), LossScale::new(4.0, 0, true));
        let mut top = control(LossScale::new(LARGEST, GROWTH_INTERVAL - 1, true), 0.0, 0);
        assert_eq!(step(&mut top, &good).factor(), LARGEST);
        let mut bottom = control(LossScale::new(SMALLEST, 0, true), 0.0, 0);
        assert_eq!(step(&mut bottom, &bad).factor(), SMALLEST);
        let mut fixed = control(LossScale::none(), 0.0, 0);
        for _ in 0..3 {
            assert_eq!(step(&mut fixed, &good), LossScale::none());
        }
    }

    #[test]
    fn rates_are_uploaded_again_before_they_run_out() {
        let mut control = control(LossScale::none(), 0.0, 0);
        for update in 0..RATES_AT_ONCE + 3 {
            // The host is a step behind.
            let (known, outstanding) = (update.saturating_sub(1), update.min(1));
            let (decision, _) = decide(&mut control, &[1.0], known, outstanding);
            assert_eq!(number(&decision.lr), SCHEDULE.lr(update), "update {update}");
        }
    }
}
