//! Rotary position embedding: the two halves of every head rotate by an angle that grows with the position.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::ops::target::{Form, Target};
use crate::torch;
use crate::torch::number::{WithNumber, range};

/// Cosines and sines by position: `[positions, E/2]` each.
#[derive(Debug)]
pub struct RopeTable {
    cos_pe: Tensor,
    sin_pe: Tensor,
}

/// How the inverse frequencies of a checkpoint are scaled beyond the plain `theta^(-2i/E)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE.
    None,
    /// Llama 3's piecewise stretch by wavelength.
    Llama3 {
        /// Divides the frequencies of long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are stretched wholly.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are left alone.
        high_freq_factor: f64,
        /// The context length of pre-training.
        original_max_position_embeddings: f64,
    },
}

/// Computes the inverse frequencies `[E/2]` of a head of width `head_dim`.
///
/// The interpolation between the two borders follows the Llama 3 reference model: with `w = 2π / f`,
/// `s = (original / w - low) / (high - low)`, the frequency becomes `(1 - s) f / factor + s f`.
pub fn inverse_frequencies(head_dim: i64, theta: f64, scaling: RopeScaling) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|i| {
            let plain = theta.powf(-2.0 * i as f64 / head_dim as f64);
            let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } =
                scaling
            else {
                return plain as f32;
            };
            let wavelength = 2.0 * std::f64::consts::PI / plain;
            let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                / (high_freq_factor - low_freq_factor);
            let smooth = smooth.clamp(0.0, 1.0);
            ((1.0 - smooth) * plain / factor + smooth * plain) as f32
        })
        .collect()
}

impl RopeTable {
    /// Tabulates `n_positions` rotations in fp32 (fp64 if `kind` is).
    pub fn new(inv_freq: &[f32], n_positions: i64, kind: Kind, device: Device) -> Result<Self> {
        let angle_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let freq = Tensor::f_from_slice(inv_freq)?.f_to_kind(angle_kind)?;
        let positions = range(0, n_positions, (angle_kind, Device::Cpu))?;
        let angles_pe = positions.f_outer(&freq)?;
        Ok(Self { cos_pe: angles_pe.f_cos()?.f_to_device(device)?, sin_pe: angles_pe.f_sin()?.f_to_device(device)? })
    }

    /// How many positions the table holds.
    pub fn n_positions(&self) -> i64 {
        self.cos_pe.size()[0]
    }

    /// Looks the rotations of given positions up, once for all layers of a micro-batch.
    pub fn at(&self, position_ids_n: &Tensor) -> Result<Rotation> {
        Ok(Rotation {
            cos_ne: self.cos_pe.f_index_select(0, position_ids_n)?,
            sin_ne: self.sin_pe.f_index_select(0, position_ids_n)?,
        })
    }
}

/// The rotations of a micro-batch's rows: `[N, E/2]` each.
#[derive(Debug)]
pub struct Rotation {
    cos_ne: Tensor,
    sin_ne: Tensor,
}

/// Rotates `x_nhe` in place; its rows are contiguous but may lie apart.
pub fn forward_(target: Target, x_nhe: &Tensor, rotation: &Rotation) -> Result<()> {
    rotate_(target, x_nhe, rotation, 1.0)
}

/// Rotates the gradient back in place: the rotation by the opposite angle.
pub fn backward_(target: Target, dx_nhe: &Tensor, rotation: &Rotation) -> Result<()> {
    rotate_(target, dx_nhe, rotation, -1.0)
}

fn rotate_(target: Target, x_nhe: &Tensor, rotation: &Rotation, sign: f64) -> Result<()> {
    match target.rows() {
        Form::CpuRows => torch::rope_(x_nhe, &rotation.cos_ne, &rotation.sin_ne, sign),
        Form::Plain => plain_rotate_(x_nhe, rotation, sign),
    }
}

/// The rotation by libtorch's ops: every dtype and device, and the judge of the row kernel. Sign -1 turns back.
pub fn plain_rotate_(x_nhe: &Tensor, rotation: &Rotation, sign: f64) -> Result<()> {
    let half = x_nhe.size()[2] / 2;
    let (mut to_a, mut to_b) = (x_nhe.f_narrow(2, 0, half)?, x_nhe.f_narrow(2, half, half)?);
    let (cos, sin) = (rotation.cos_ne.f_unsqueeze(1)?, rotation.sin_ne.f_times(sign)?.f_unsqueeze(1)?);
    let (a, b) = (to_a.f_to_kind(cos.kind())?, to_b.f_to_kind(cos.kind())?);
    let (new_a, new_b) = (a.f_mul(&cos)?.f_sub(&b.f_mul(&sin)?)?, b.f_mul(&cos)?.f_add(&a.f_mul(&sin)?)?);
    to_a.f_copy_(&new_a)?;
    to_b.f_copy_(&new_b)?;
    Ok(())
}
