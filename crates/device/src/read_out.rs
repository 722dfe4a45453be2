//! Read-outs on the device: a state's sums are put together, one graph for all sites runs, the core comes back as a value.
//!
//! Of states that rest on the device nothing goes up; those that the host has are there only while they are read out. Generators whose
//! read-out the device has no form for are read out by the processor. Start at [`Reader::read`].

use candle_core::Tensor;
use cuda::{
    Buffer, Device, Error, GeneratorShape, Graph, Model,
    ops::{Emitted, SiteCores, add_scaled},
    read_out::{ITERATIONS, Kind, MORE_ITERATIONS, ReadOut, Sites},
};
use generator::{Core, Generator, PlainCore, State};
use half::bf16;

use crate::{machine::of_state, windows::Windows};

/// More of N than this is not left undone if more iterations can help.
const LEFT: f64 = 1e-2;

/// A read-out with what it is told and what it finds.
pub(crate) struct Reader {
    device: Device,
    sites: Sites,
    read_out: ReadOut,
    graph: Graph,
    /// The same with more iterations, where there are any.
    longer: Option<Graph>,
    /// [sites, R1, R2]
    s: Buffer<f32>,
    /// [sites, R1, R1]
    g: Option<Buffer<f32>>,
    /// `[sites]`
    floors: Buffer<f64>,
    /// [sites, core of a site]
    core: Buffer<bf16>,
    site_size: usize,
}

impl Reader {
    /// Memory and a graph for a generator's read-outs; `None` for those that the processor does.
    ///
    /// # Errors
    /// [`Error::Call`] without enough memory.
    pub(crate) fn new(
        device: &Device,
        generator: &Generator,
        shape: &GeneratorShape,
    ) -> Result<Option<Self>, Error> {
        let config = generator.config();
        let (r1, r2, max_rank) = (config.r1, config.r2, config.max_rank);
        let (kind, rank) = match config.read_out {
            generator::ReadOut::Svd => (Kind::Svd, max_rank),
            generator::ReadOut::Ridge => (Kind::Ridge, shape.rank.min(max_rank)),
            generator::ReadOut::Frobenius | generator::ReadOut::Spectral => return Ok(None),
        };
        // Kernels take eights, and no more directions than there are.
        if rank > r1.min(r2) || !rank.is_multiple_of(8) {
            return Ok(None);
        }
        let sites = Sites {
            count: generator.sites().len(),
            r1,
            r2,
            rank,
        };
        let lambdas = generator.sites().iter().filter_map(generator::Site::ridge);
        let lambdas: Vec<f64> = lambdas.collect();
        let lambdas: &[f64] = if kind == Kind::Ridge { &lambdas } else { &[] };
        let mut read_out = match ReadOut::new(device, kind, sites, ITERATIONS, lambdas) {
            Err(Error::Unsupported { .. }) => return Ok(None),
            read_out => read_out?,
        };
        let site_size = SiteCores::size(r1, r2, rank);
        let s = device.zeros::<f32>(sites.count * r1 * r2)?;
        let g = (kind == Kind::Ridge)
            .then(|| device.zeros::<f32>(sites.count * r1 * r1))
            .transpose()?;
        let floors = device.zeros(sites.count)?;
        let core = device.zeros(sites.count * site_size)?;
        let captured = |read_out: &ReadOut| {
            let run = || {
                let to = Emitted {
                    slot: core.view(),
                    offset: 0,
                    site_size,
                };
                let g = g.as_ref().map(Buffer::view);
                read_out.run(device, s.view(), g, floors.view(), &to)
            };
            // Once before: what cuBLAS loads and chooses at its first call cannot be captured.
            run()?;
            device.synchronize()?;
            device.capture(run)
        };
        let graph = captured(&read_out)?;
        read_out.set_iterations(MORE_ITERATIONS);
        let longer = (rank > 0).then(|| captured(&read_out)).transpose()?;
        Ok(Some(Self {
            device: device.clone(),
            sites,
            read_out,
            graph,
            longer,
            s,
            g,
            floors,
            core,
            site_size,
        }))
    }

    /// The core of a state that is not empty. Nothing of either stays on the device.
    ///
    /// # Errors
    /// As [`Generator::read_out`], and [`generator::Error::Device`].
    pub(crate) fn read(
        &self,
        generator: &Generator,
        state: &State,
        (windows, model): (&mut Windows, &Model),
    ) -> Result<Core, generator::Error> {
        let mut floors = vec![0.0; self.sites.count];
        if state.is_here() {
            self.upload(state, &mut floors)?;
        } else {
            self.clear().map_err(|error| of_state(&error))?;
        }
        let put = self.put_together(state, windows, model, floors);
        put.map_err(|error| of_state(&error))?;
        let core = self.run(generator);
        let cleared = self.clear();
        let core = core?;
        cleared.map_err(|error| of_state(&error))?;
        Ok(core)
    }

    /// Adds what the device has of a state to what was uploaded of it.
    fn put_together(
        &self,
        state: &State,
        windows: &mut Windows,
        model: &Model,
        mut floors: Vec<f64>,
    ) -> Result<(), Error> {
        for part in state.elsewhere() {
            let sums = windows.sums_of(model, part.name())?;
            add_scaled(&self.device, self.s.view(), sums.s.view(), part.weight())?;
            if let (Some(to), Some(g)) = (&self.g, &sums.g) {
                add_scaled(&self.device, to.view(), g.view(), part.weight())?;
            }
            if let Some(mass) = &sums.mass {
                let weight = f64::from(f32::EPSILON) * f64::from(part.weight()).abs();
                for (floor, mass) in floors.iter_mut().zip(mass.read()?) {
                    *floor += weight * mass;
                }
            }
        }
        self.floors.view().write(&self.device, &floors)
    }

    fn upload(&self, state: &State, floors: &mut [f64]) -> Result<(), generator::Error> {
        let Sites { r1, r2, .. } = self.sites;
        let put = |to: &Buffer<f32>, at: usize, size: usize, values: &Tensor| {
            let values: Vec<f32> = values.flatten_all()?.to_vec1()?;
            let part = to.view().part(at * size, size);
            let written = part.and_then(|part| part.write(&self.device, &values));
            written.map_err(|error| of_state(&error))
        };
        for (site, floor) in floors.iter_mut().enumerate() {
            let missing = || generator::Error::Foreign {
                detail: format!("a state without site {site}"),
            };
            let (s, g) = state.sums(site).ok_or_else(missing)?;
            put(&self.s, site, r1 * r2, s)?;
            if let Some(to) = &self.g {
                put(to, site, r1 * r1, g.ok_or_else(missing)?)?;
            }
            *floor = f64::from(f32::EPSILON) * state.mass(site).unwrap_or(0.0);
        }
        Ok(())
    }

    fn run(&self, generator: &Generator) -> Result<Core, generator::Error> {
        let Sites {
            count, r1, rank, ..
        } = self.sites;
        match self.solve() {
            Ok(()) => {}
            Err(Error::NotPositive { site }) => {
                let site = generator.sites().get(site).map(generator::Site::id);
                let broken = of_state(&Error::Shape {
                    what: "a site that is not there".into(),
                });
                return Err(site.map_or(broken, |site| generator::Error::NotPositive { site }));
            }
            Err(error) => return Err(of_state(&error)),
        }
        let values = self.core.read().map_err(|error| of_state(&error))?;
        let mut sites = Vec::with_capacity(count);
        for (values, site) in values.chunks_exact(self.site_size).zip(generator.sites()) {
            if !values.iter().all(|value| value.is_finite()) {
                return Err(generator::Error::NotFinite { site: site.id() });
            }
            sites.push(if values.iter().all(|value| *value == bf16::ZERO) {
                PlainCore::Zero
            } else if rank == 0 {
                PlainCore::Dense(turned(values, r1)) // Nᵀ [R2, R1] -> N [R1, R2]
            } else {
                let (u, v) = values.split_at(rank * r1);
                PlainCore::LowRank {
                    u: turned(u, r1),                                  // Uᵀ [q, R1] -> U [R1, q]
                    v: v.iter().map(|value| value.to_f32()).collect(), // [R2, q]
                }
            });
        }
        generator.core(sites)
    }

    /// Runs as many iterations as the spectrum asks for.
    fn solve(&self) -> Result<(), Error> {
        self.graph.launch()?;
        self.read_out.check()?;
        if let Some(longer) = &self.longer
            && self.read_out.left(ITERATIONS)? > LEFT
        {
            longer.launch()?;
        }
        Ok(())
    }

    fn clear(&self) -> Result<(), Error> {
        self.s.view().clear(&self.device)?;
        if let Some(g) = &self.g {
            g.view().clear(&self.device)?;
        }
        self.core.view().clear(&self.device)
    }
}

/// The transpose of a matrix of rows of so many columns, in f32.
fn turned(values: &[bf16], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    let mut out = Vec::with_capacity(values.len());
    for column in 0..columns {
        out.extend((0..rows).map(|row| values[row * columns + column].to_f32()));
    }
    out
}
