//! Tables for people: columns as wide as needed, numbers to the right.

/// Prints rows under headings. Columns whose heading begins with `>` are aligned to the right.
pub(crate) fn print(headings: &[&str], rows: &[Vec<String>]) {
    print!("{}", render(headings, rows));
}

fn render(headings: &[&str], rows: &[Vec<String>]) -> String {
    let names: Vec<&str> = headings.iter().map(|h| h.trim_start_matches('>')).collect();
    let mut widths: Vec<usize> = names.iter().map(|n| n.chars().count()).collect();
    for row in rows {
        for (w, cell) in widths.iter_mut().zip(row) {
            *w = (*w).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut out = String::new();
        for ((cell, width), heading) in cells.zip(&widths).zip(headings) {
            let padding = " ".repeat(width - cell.chars().count());
            if heading.starts_with('>') {
                out += &padding;
                out += cell;
            } else {
                out += cell;
                out += &padding;
            }
            out += "  ";
        }
        text += out.trim_end();
        text.push('\n');
    };
    line(&mut names.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

/// Thousands apart: `12 345 678`.
pub(crate) fn number(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_numbers_go_right() {
        let rows = [
            vec!["a".into(), "5".into()],
            vec!["long".into(), "1 234".into()],
        ];
        assert_eq!(
            render(&["name", ">count"], &rows),
            "name  count\na         5\nlong  1 234\n"
        );
    }

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!(number(0), "0");
        assert_eq!(number(999), "999");
        assert_eq!(number(1_234_567), "1 234 567");
    }
}
