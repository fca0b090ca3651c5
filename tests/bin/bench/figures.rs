//! What is said of a series of measurements. Medians: one start that another program disturbed shall not move them.

/// Measurements of one thing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Series(Vec<f64>);

impl FromIterator<f64> for Series {
    fn from_iter<T: IntoIterator<Item = f64>>(values: T) -> Series {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Series(values)
    }
}

impl Series {
    /// The value below which `part` of the series lies, between two values in proportion.
    fn quantile(&self, part: f64) -> f64 {
        let Some(last) = self.0.len().checked_sub(1) else {
            return f64::NAN;
        };
        let at = part * last as f64;
        let (below, above) = (at.floor() as usize, at.ceil() as usize);
        self.0[below] + (self.0[above] - self.0[below]) * at.fract()
    }

    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub(crate) fn min(&self) -> f64 {
        self.quantile(0.0)
    }

    pub(crate) fn max(&self) -> f64 {
        self.quantile(1.0)
    }

    /// The middle half's width, as a part of the median.
    pub(crate) fn spread(&self) -> f64 {
        (self.quantile(0.75) - self.quantile(0.25)) / self.median()
    }
}

#[cfg(test)]
mod tests {
    use super::Series;

    #[test]
    fn the_figures_are_those_of_the_textbook() {
        let of = |values: &[f64]| values.iter().copied().collect::<Series>();
        let odd = of(&[5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!((odd.min(), odd.median(), odd.max()), (1.0, 3.0, 5.0));
        assert!((odd.spread() - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(of(&[1.0, 2.0]).median(), 1.5);
        assert_eq!(of(&[7.0]).spread(), 0.0);
        assert!(of(&[]).median().is_nan());
    }
}
