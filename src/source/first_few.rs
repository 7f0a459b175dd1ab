//! Reports many failures in one message: their count and the first five.

use std::fmt;

/// The count of some items, and the first five of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstFew<T> {
    /// Number of all items.
    pub count: usize,
    /// The first items, at most five.
    pub first: Vec<T>,
}

impl<T> FirstFew<T> {
    const SHOWN: usize = 5;

    /// Whether there are no items.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl<T> Default for FirstFew<T> {
    fn default() -> Self {
        FirstFew { count: 0, first: Vec::new() }
    }
}

impl<T> Extend<T> for FirstFew<T> {
    fn extend<I: IntoIterator<Item = T>>(&mut self, items: I) {
        for item in items {
            if self.first.len() < Self::SHOWN {
                self.first.push(item);
            }
            self.count += 1;
        }
    }
}

impl<T> FromIterator<T> for FirstFew<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let mut first_few = FirstFew::default();
        first_few.extend(items);
        first_few
    }
}

impl<T: fmt::Display> fmt::Display for FirstFew<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, item) in self.first.iter().enumerate() {
            write!(f, "{}{item}", if i == 0 { "" } else { "; " })?;
        }
        match self.count - self.first.len() {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_most_five_are_shown() {
        let shown = |n: usize| (0..n).collect::<FirstFew<usize>>().to_string();
        assert_eq!(shown(0), "");
        assert_eq!(shown(2), "0; 1");
        assert_eq!(shown(5), "0; 1; 2; 3; 4");
        assert_eq!(shown(8), "0; 1; 2; 3; 4; and 3 more");
    }
}
