//! A matrix is turned whatever its sides.

use super::transpose;
use crate::noise::noise;

#[test]
fn a_matrix_is_turned_whatever_its_sides() {
    for (rows, columns) in [(0, 5), (1, 1), (8, 8), (16, 24), (7, 40), (33, 9), (19, 71)] {
        let values = noise(5, rows * columns);
        let turned = transpose(&values, rows, columns);
        assert_eq!(turned.len(), values.len());
        for row in 0..rows {
            for column in 0..columns {
                assert_eq!(turned[column * rows + row], values[row * columns + column]);
            }
        }
    }
}
