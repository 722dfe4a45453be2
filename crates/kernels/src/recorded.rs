//! Results that know their way back: what a kernel computed, with the gradient of its inputs.
//!
//! A kernel computes its values as ever and hands them over with a closure for the way back. Where no input
//! is tracked by candle's autograd, nothing is recorded: serving pays nothing and keeps its bits. Start at
//! [`recorded1`].

use std::sync::Mutex;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail,
};

use crate::floats::tensor;

/// Values that a forward has already computed, to be taken once.
struct Value {
    name: &'static str,
    values: Mutex<Option<Vec<f32>>>,
    shape: Shape,
}

impl Value {
    fn new(name: &'static str, values: Vec<f32>, shape: Shape) -> Self {
        Self {
            name,
            values: Mutex::new(Some(values)),
            shape,
        }
    }

    fn take(&self) -> Result<(CpuStorage, Shape)> {
        let values = self.values.lock().ok().and_then(|mut values| values.take());
        let Some(values) = values else {
            bail!("the result of {} was taken twice", self.name)
        };
        Ok((CpuStorage::F32(values), self.shape.clone()))
    }
}

struct Recorded<B> {
    value: Value,
    back: B,
}

impl<B> CustomOp1 for Recorded<B>
where
    B: Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
{
    fn name(&self) -> &'static str {
        self.value.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.value.take()
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        (self.back)(x, y, &dy.contiguous()?).map(Some)
    }
}

/// Gradients of two inputs; `None` for one that is not tracked.
type Two = (Option<Tensor>, Option<Tensor>);
/// Gradients of three inputs.
type Three = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl<B> CustomOp2 for Recorded<B>
where
    B: Fn([&Tensor; 2], &Tensor, &Tensor) -> Result<Two>,
{
    fn name(&self) -> &'static str {
        self.value.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.value.take()
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Two> {
        (self.back)([a, b], y, &dy.contiguous()?)
    }
}

impl<B> CustomOp3 for Recorded<B>
where
    B: Fn([&Tensor; 3], &Tensor, &Tensor) -> Result<Three>,
{
    fn name(&self) -> &'static str {
        self.value.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.value.take()
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, c: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Three> {
        (self.back)([a, b, c], y, &dy.contiguous()?)
    }
}

/// A tensor of `values`, computed from `x`; `back(x, y, dy)` gives the gradient of x. `dy` is contiguous.
///
/// # Errors
/// If `values` are not as many as `shape` says.
pub fn recorded1(
    name: &'static str,
    x: &Tensor,
    values: Vec<f32>,
    shape: impl Into<Shape>,
    back: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let shape = shape.into();
    if !x.track_op() {
        return tensor(values, shape);
    }
    let value = Value::new(name, values, shape);
    x.apply_op1(Recorded { value, back })
}

/// The same of two inputs; `back([a, b], y, dy)` gives `None` for an input that is not tracked.
///
/// # Errors
/// If `values` are not as many as `shape` says.
pub fn recorded2(
    name: &'static str,
    [a, b]: [&Tensor; 2],
    values: Vec<f32>,
    shape: impl Into<Shape>,
    back: impl Fn([&Tensor; 2], &Tensor, &Tensor) -> Result<Two> + Send + Sync + 'static,
) -> Result<Tensor> {
    let shape = shape.into();
    if !a.track_op() && !b.track_op() {
        return tensor(values, shape);
    }
    let value = Value::new(name, values, shape);
    a.apply_op2(b, Recorded { value, back })
}

/// The same of three inputs.
///
/// # Errors
/// If `values` are not as many as `shape` says.
pub fn recorded3(
    name: &'static str,
    [a, b, c]: [&Tensor; 3],
    values: Vec<f32>,
    shape: impl Into<Shape>,
    back: impl Fn([&Tensor; 3], &Tensor, &Tensor) -> Result<Three> + Send + Sync + 'static,
) -> Result<Tensor> {
    let shape = shape.into();
    if !a.track_op() && !b.track_op() && !c.track_op() {
        return tensor(values, shape);
    }
    let value = Value::new(name, values, shape);
    a.apply_op3(b, c, Recorded { value, back })
}
