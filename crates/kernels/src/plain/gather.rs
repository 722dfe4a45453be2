//! Rows picked out of a matrix, whose gradient is picked back out.
//!
//! candle's own gather adds its gradient up row by row; where no row is picked twice that is a gather again. Start at [`gather`].

use candle_core::{Result, Tensor, bail};

use super::computed;

/// Of each row where it comes from; None: a row of zeros.
pub(crate) type Places = Vec<Option<usize>>;

/// Of each of `rows` rows where it went; None: nowhere.
pub(crate) fn inverse(places: &Places, rows: usize) -> Places {
    let mut inverse = vec![None; rows];
    for (to, from) in places.iter().enumerate() {
        if let Some(slot) = from.and_then(|from| inverse.get_mut(from)) {
            *slot = Some(to);
        }
    }
    inverse
}

/// x [T, C] -> [P, C], row i the row `places[i]` of x. Differentiable.
pub(crate) fn gather(x: &Tensor, places: &Places) -> Result<Tensor> {
    let (rows, _) = x.dims2()?;
    let mut seen = vec![false; rows];
    let mut twice = false;
    for &from in places.iter().flatten() {
        match seen.get_mut(from) {
            Some(seen) => twice |= std::mem::replace(seen, true),
            None => bail!("row {from} of {rows}"),
        }
    }
    if twice {
        return picked(x, places);
    }
    let y = picked(&x.detach(), places)?; // [P, C]
    let back = inverse(places, rows);
    computed("gather", x, y, move |dy| picked(dy, &back))
}

/// The same by candle's own operations.
fn picked(x: &Tensor, places: &Places) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let straight = places.len() == rows
        && places
            .iter()
            .enumerate()
            .all(|(to, from)| *from == Some(to));
    if straight {
        return x.contiguous();
    }
    let u32 = |row: usize| u32::try_from(row).map_err(candle_core::Error::wrap);
    let index = places
        .iter()
        .map(|from| u32(from.unwrap_or(rows)))
        .collect::<Result<Vec<u32>>>()?;
    let index = Tensor::new(index.as_slice(), x.device())?; // [P]
    if places.iter().all(Option::is_some) {
        return x.contiguous()?.index_select(&index, 0); // [P, C]
    }
    let zeros = Tensor::zeros((1, width), x.dtype(), x.device())?;
    Tensor::cat(&[x, &zeros], 0)?.index_select(&index, 0) // [P, C]
}
