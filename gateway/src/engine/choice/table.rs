//! What was measured.

use sa_store::runtime::Place;
use sa_store::sa::Direction;
use sa_store::suite::Suite;

/// Sizes of inner packets that are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// 64 bytes.
    B64,
    /// 512 bytes.
    B512,
    /// 1420 bytes.
    B1420,
    /// Seven of 64, four of 576, one of 1420 bytes.
    Imix,
}

impl Size {
    /// All, in the order of a row's cells.
    pub const ALL: [Self; 4] = [Self::B64, Self::B512, Self::B1420, Self::Imix];

    /// Inner packets, bytes, in the order in which they come.
    pub const fn packets(self) -> &'static [u16] {
        match self {
            Self::B64 => &[64],
            Self::B512 => &[512],
            Self::B1420 => &[1420],
            Self::Imix => &[64, 576, 64, 64, 576, 64, 1420, 64, 576, 64, 576, 64],
        }
    }

    /// The one size; none of the mix.
    pub fn mean(self) -> Option<f64> {
        match self.packets() {
            [one] => Some(f64::from(*one)),
            _ => None,
        }
    }

    /// For tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::B64 => "64",
            Self::B512 => "512",
            Self::B1420 => "1420",
            Self::Imix => "imix",
        }
    }
}

/// What a packet costs in one place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    /// Nanoseconds from packet to packet: the inverse of the throughput.
    pub ns: f64,
    /// Nanoseconds of the worker's CPU: ciphering, or giving the packet to the engine and taking it back.
    pub cpu_ns: f64,
}

impl Figure {
    fn is_possible(&self) -> bool {
        [self.ns, self.cpu_ns]
            .into_iter()
            .all(|ns| ns.is_finite() && ns > 0.0)
    }

    /// On the line from one figure to another, `part` of the way.
    fn between(a: Self, b: Self, part: f64) -> Self {
        Self {
            ns: a.ns + (b.ns - a.ns) * part,
            cpu_ns: a.cpu_ns + (b.cpu_ns - a.cpu_ns) * part,
        }
    }
}

/// One suite and direction in one place.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    suite: Suite,
    direction: Direction,
    place: Place,
    cells: [Option<Figure>; Size::ALL.len()],
}

impl Row {
    /// A row without figures.
    pub fn new(suite: Suite, direction: Direction, place: Place) -> Self {
        Self {
            suite,
            direction,
            place,
            cells: [None; Size::ALL.len()],
        }
    }

    /// Sets a cell. A figure that no clock can have shown is left out.
    pub fn set(&mut self, size: Size, figure: Figure) {
        self.cells[size as usize] = Some(figure).filter(Figure::is_possible);
    }

    /// A cell.
    pub fn cell(&self, size: Size) -> Option<Figure> {
        self.cells[size as usize]
    }

    /// The figure for packets of `mean` bytes: costs go with the size nearly in a line. Without a size, that of the mix.
    pub fn at(&self, mean: Option<f64>) -> Option<Figure> {
        let Some(mean) = mean else {
            return self.cell(Size::Imix);
        };
        let ends = if mean < 512.0 {
            (Size::B64, 64.0, Size::B512, 512.0)
        } else {
            (Size::B512, 512.0, Size::B1420, 1420.0)
        };
        let (a, from, b, to) = ends;
        let part = ((mean - from) / (to - from)).clamp(0.0, 1.0);
        Some(Figure::between(self.cell(a)?, self.cell(b)?, part))
    }

    /// Algorithms.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// Sealing or opening.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Where.
    pub fn place(&self) -> Place {
        self.place
    }
}

/// All rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    rows: Vec<Row>,
}

impl Table {
    /// In the order in which they were measured.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// One row.
    pub fn row(&self, suite: Suite, direction: Direction, place: Place) -> Option<&Row> {
        self.rows
            .iter()
            .find(|r| r.suite == suite && r.direction == direction && r.place == place)
    }
}

impl FromIterator<Row> for Table {
    fn from_iter<T: IntoIterator<Item = Row>>(rows: T) -> Self {
        Self {
            rows: rows.into_iter().collect(),
        }
    }
}

impl Extend<Row> for Table {
    fn extend<T: IntoIterator<Item = Row>>(&mut self, rows: T) {
        self.rows.extend(rows);
    }
}
