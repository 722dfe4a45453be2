//! One decoder layer, with the sites that sit in it: what they write, and what they add.

use half::bf16;

use super::{EPS, Model, SiteWork, Write};
use crate::{
    Batch, Buffer, Element, Error, Form, GeneratorShape, Place, Shape, View,
    batch::Group,
    ops::{
        self, Attention, Cache, MOST_ROWS, Matrix, Parts, Product, Quantised, Rotation, SiteCores,
        SiteGates,
    },
    weights::{Layer, Linear, SiteWeights},
};

impl Model {
    /// y [T, out] = x [T, in] Wᵀ.
    pub(super) fn linear<Y: Element>(
        &self,
        y: View<'_, Y>,
        x: View<'_, bf16>,
        w: &Buffer<bf16>,
        rows: usize,
        out: usize,
        features: usize,
    ) -> Result<(), Error> {
        let product = Product::linear(rows, out, features);
        ops::multiply(
            &self.device,
            &product,
            Matrix::dense(x, features),
            Matrix::dense(w.view(), features),
            Matrix::dense(y, out),
        )
    }

    /// The same with a linear of the base, which may be quantised.
    pub(super) fn base<Y: Element>(
        &self,
        y: View<'_, Y>,
        x: View<'_, bf16>,
        w: &Linear,
        rows: usize,
        out: usize,
        features: usize,
    ) -> Result<(), Error> {
        let (codes, scales, bits) = match w {
            Linear::Rounded(w) => return self.linear(y, x, w, rows, out, features),
            Linear::Quantised {
                codes,
                scales,
                bits,
            } => (codes.view(), scales.view(), *bits),
        };
        let w = Quantised {
            codes,
            scales,
            bits,
            out,
            features,
        };
        if rows == 0 {
            return Ok(());
        }
        let Some(dequantised) = self.work.dequantised.as_ref().filter(|_| rows > MOST_ROWS) else {
            return ops::multiply_quantised(&self.device, y, x, &w, rows);
        };
        ops::dequantise(&self.device, dequantised.view(), &w)?;
        self.linear(y, x, dequantised, rows, out, features)
    }

    /// A layer: `h` holds the residual that enters it and `x` its norm; leaves what is to be added to `h` in `y`. Whether anything behind it
    /// is wanted.
    pub(super) fn layer(
        &self,
        index: usize,
        layer: &Layer,
        batch: &Batch,
        writes: &[Write<'_>],
        adapted: bool,
    ) -> Result<bool, Error> {
        let (device, work, rows) = (&self.device, &self.work, batch.rows);
        let Shape {
            hidden: d,
            intermediate: f,
            heads,
            eps,
            ..
        } = self.shape;
        let (queries, stride) = (heads.queries * heads.dim, heads.stride());
        if !writes.is_empty() {
            self.values_of(layer, rows)?;
        }
        self.base(work.qkv.view(), work.x.view(), &layer.qkv, rows, stride, d)?;
        if let Some(bias) = &layer.qkv_bias {
            ops::add_bias(device, work.qkv.view(), bias.view(), rows, stride)?;
        }
        if let Some([q, k]) = &layer.head_norms {
            ops::head_norm(
                device,
                work.qkv.view(),
                q.view(),
                rows,
                0,
                heads.queries,
                heads.dim,
                stride,
                eps,
            )?;
            ops::head_norm(
                device,
                work.qkv.view(),
                k.view(),
                rows,
                heads.queries,
                heads.keys,
                heads.dim,
                stride,
                eps,
            )?;
        }
        let cache = Cache {
            k: self.cache[index][0].view(),
            v: self.cache[index][1].view(),
        };
        let rotation = Rotation {
            cos: self.cos.view(),
            sin: self.sin.view(),
        };
        ops::rope_append(
            device,
            work.q.view(),
            work.qkv.view(),
            cache,
            rotation,
            batch.positions()?,
            batch.cache_slots()?,
            rows,
            heads,
        )?;
        let attention = Attention {
            heads,
            block_size: self.memory.block_size,
            window: self.shape.window,
            splits: batch.splits(),
        };
        let parts = Parts {
            sums: work.sums.view(),
            extents: work.extents.view(),
        };
        ops::attend(
            device,
            work.heads.view(),
            Some(parts),
            work.q.view(),
            cache,
            &batch.ragged()?,
            &attention,
            rows,
        )?;

        // A batch that only writes ends behind its last site.
        let ends_at = |place: Place| {
            batch.wanted == 0
                && index + 1 == self.shape.layers
                && self
                    .generator
                    .as_ref()
                    .filter(|_| !layer.sites.is_empty())
                    .is_none_or(|g| g.places.last() == Some(&place))
        };
        self.site(
            index,
            layer,
            Place::Output,
            work.heads.view(),
            queries,
            batch,
            writes,
            adapted,
        )?;
        if ends_at(Place::Output) {
            return Ok(false);
        }
        self.base(
            work.y.view(),
            work.heads.view(),
            &layer.output,
            rows,
            d,
            queries,
        )?;
        self.add_delta(layer, Place::Output, rows, adapted)?;
        ops::add_rms_norm(
            device,
            work.x.view(),
            work.h.view(),
            work.y.view(),
            layer.post_norm.view(),
            rows,
            d,
            eps,
        )?;
        self.base(
            work.gate_up.view(),
            work.x.view(),
            &layer.gate_up,
            rows,
            2 * f,
            d,
        )?;
        ops::silu_mul(device, work.middle.view(), work.gate_up.view(), rows, f)?;
        self.site(
            index,
            layer,
            Place::Down,
            work.middle.view(),
            f,
            batch,
            writes,
            adapted,
        )?;
        if ends_at(Place::Down) {
            return Ok(false);
        }
        self.base(work.y.view(), work.middle.view(), &layer.down, rows, d, f)?;
        self.add_delta(layer, Place::Down, rows, adapted)?;
        Ok(true)
    }

    /// Where a place is among the generator's.
    fn place(&self, place: Place) -> Option<(&GeneratorShape, usize)> {
        let generator = self.generator.as_ref()?;
        Some((
            generator,
            generator.places.iter().position(|other| *other == place)?,
        ))
    }

    /// What the residual that enters a layer gives to its sites: values, and keys in the published form.
    fn values_of(&self, layer: &Layer, rows: usize) -> Result<(), Error> {
        let (Some(generator), Some(work)) = (&self.generator, &self.work.site) else {
            return Ok(());
        };
        let (d, r1, r2) = (self.shape.hidden, generator.r1, generator.r2);
        for (
            index,
            SiteWeights {
                gain, hidden, a3, ..
            },
        ) in layer.sites.iter().enumerate()
        {
            let (keys, values) = (work.keys[index].view(), work.values[index].view());
            ops::norm_residual(
                &self.device,
                work.n.view(),
                self.work.h.view(),
                gain.view(),
                rows,
                d,
                EPS,
            )?;
            match generator.form {
                Form::Published => {
                    self.linear(keys, work.n.view(), hidden, rows, r1, d)?;
                    self.linear(values, work.n.view(), a3, rows, r2, d)?;
                }
                Form::Associative => {
                    self.linear(values, work.n.view(), hidden, rows, r2, d)?;
                    let more = Product::linear(rows, r2, d).scaled(1.0, 1.0);
                    ops::multiply(
                        &self.device,
                        &more,
                        Matrix::dense(work.next.view(), d),
                        Matrix::dense(a3.view(), d),
                        Matrix::dense(values, r2),
                    )?;
                }
            }
        }
        Ok(())
    }

    /// At a site, x [T, in]: what rows write, and c [T, R2] of the rows' cores.
    #[expect(
        clippy::too_many_arguments,
        reason = "a place in a layer and what runs there"
    )]
    fn site(
        &self,
        index: usize,
        layer: &Layer,
        place: Place,
        x: View<'_, bf16>,
        features: usize,
        batch: &Batch,
        writes: &[Write<'_>],
        adapted: bool,
    ) -> Result<(), Error> {
        let (Some((generator, at)), Some(work), Some(first)) = (
            self.place(place),
            &self.work.site,
            (self.generator.as_ref()).and_then(|generator| generator.first_site(index)),
        ) else {
            return Ok(());
        };
        let keyed = !writes.is_empty() && generator.form == Form::Associative;
        let (rows, r1, r2) = (batch.rows, generator.r1, generator.r2);
        if adapted || keyed {
            self.linear(work.a.view(), x, &layer.sites[at].a1, rows, r1, features)?;
        }
        let site = first + at;
        let keys = if keyed {
            work.a.view()
        } else {
            work.keys[at].view()
        };
        if let (Some(written), false) = (&self.written, writes.is_empty()) {
            let keep = |to: &Buffer<bf16>, from: View<'_, f32>, width: usize| {
                let at = site * self.memory.rows * width;
                let to = to.view().part(at, rows * width)?;
                ops::narrow(&self.device, to, from, rows * width)
            };
            keep(&written.keys, keys, r1)?;
            keep(&written.values, work.values[at].view(), r2)?;
        }
        for write in writes.iter().filter(|write| write.len > 0) {
            let k = Matrix::dense(keys.part(write.first * r1, write.len * r1)?, r1);
            let v = Matrix::dense(
                work.values[at]
                    .view()
                    .part(write.first * r2, write.len * r2)?,
                r2,
            );
            let outer = Product {
                a_transposed: true,
                b_transposed: false,
                m: r1,
                n: r2,
                k: write.len,
                alpha: 1.0,
                beta: 1.0,
                batch: 1,
            };
            ops::multiply(
                &self.device,
                &outer,
                k,
                v,
                Matrix::dense(write.sums.s.view().part(site * r1 * r2, r1 * r2)?, r2),
            )?;
            if let Some(g) = &write.sums.g {
                let outer = Product { n: r1, ..outer };
                ops::multiply(
                    &self.device,
                    &outer,
                    k,
                    k,
                    Matrix::dense(g.view().part(site * r1 * r1, r1 * r1)?, r1),
                )?;
            }
            if let Some(mass) = &write.sums.mass {
                let mass = mass.view().part(site, 1)?;
                ops::add_mass(&self.device, mass, k.view, v.view, write.len, r1, r2)?;
            }
        }
        if let (true, Some(slots)) = (adapted, &self.slots) {
            let cores = SiteCores {
                arena: slots.arena(),
                slot_size: slots.size(),
                offset: site * generator.site_size(),
                r1,
                r2,
                rank: generator.rank,
            };
            ops::apply_cores(
                &self.device,
                work.c.view(),
                work.b.view(),
                work.a.view(),
                &cores,
                batch.slots()?,
                batch.scales()?,
                rows,
            )?;
            for group in &batch.groups {
                self.apply_to_group(group, &cores, work)?;
            }
            if let (Some((threshold, width)), Some(doubts)) = (generator.gate, &work.doubts) {
                let first = generator.sites(self.shape.layers) * generator.site_size();
                let gates = SiteGates {
                    arena: slots.arena(),
                    slot_size: slots.size(),
                    offset: first + site * SiteGates::size(r1),
                    r1,
                    r2,
                    threshold,
                    width,
                };
                let (c, a) = (work.c.view(), work.a.view());
                let held = batch.held()?;
                ops::close_gates(&self.device, c, doubts.view(), a, &gates, held, rows)?;
            }
        }
        Ok(())
    }

    /// c [T, R2] of the rows of one core, by matrix products.
    fn apply_to_group(
        &self,
        group: &Group,
        cores: &SiteCores<'_>,
        work: &SiteWork,
    ) -> Result<(), Error> {
        let &Group {
            first,
            rows,
            slot,
            scale,
        } = group;
        let SiteCores { r1, r2, rank, .. } = *cores;
        let at = slot * cores.slot_size + cores.offset;
        let core = cores.arena.part(at, SiteCores::size(r1, r2, rank))?;
        let (wide, a) = (
            work.a.view().part(first * r1, rows * r1)?,
            work.a_grouped.view().part(first * r1, rows * r1)?,
        );
        ops::narrow(&self.device, a, wide, rows * r1)?;
        let a = Matrix::dense(a, r1);
        let c = Matrix::dense(work.c.view().part(first * r2, rows * r2)?, r2);
        let device = &self.device;
        if rank == 0 {
            let product = Product::linear(rows, r2, r1).scaled(f64::from(scale), 0.0);
            return ops::multiply(device, &product, a, Matrix::dense(core, r1), c);
        }
        let b = work.b_grouped.view().part(first * rank, rows * rank)?;
        let b = Matrix::dense(b, rank);
        let (u, v) = (core.part(0, rank * r1)?, core.part(rank * r1, rank * r2)?); // Uᵀ [q, R1], V [R2, q]
        let down = Product::linear(rows, rank, r1);
        ops::multiply(device, &down, a, Matrix::dense(u, r1), b)?;
        let up = Product::linear(rows, r2, rank).scaled(f64::from(scale), 0.0);
        ops::multiply(device, &up, b, Matrix::dense(v, rank), c)
    }

    /// y [T, D] += c Bᵀ of a site, if there is one.
    fn add_delta(
        &self,
        layer: &Layer,
        place: Place,
        rows: usize,
        adapted: bool,
    ) -> Result<(), Error> {
        let (Some((generator, at)), Some(work), true) =
            (self.place(place), &self.work.site, adapted)
        else {
            return Ok(());
        };
        let Some(site) = layer.sites.get(at) else {
            return Ok(());
        };
        let (d, r2) = (self.shape.hidden, generator.r2);
        let more = Product::linear(rows, d, r2).scaled(1.0, 1.0);
        let (c, b) = (
            Matrix::dense(work.c.view(), r2),
            Matrix::dense(site.b.view(), r2),
        );
        ops::multiply(
            &self.device,
            &more,
            c,
            b,
            Matrix::dense(self.work.y.view(), d),
        )
    }
}
