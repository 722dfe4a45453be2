//! What a server tells of itself at `/metrics`, before and after a load.
//!
//! Start at [`scrape`].

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// How long a server may take to tell.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most that is read of it.
const MOST: u64 = 4 << 20;

/// The samples at `http://HOST:PORT/metrics`, by name and labels; buckets of histograms are left out.
pub(crate) async fn scrape(url: &str) -> Result<BTreeMap<String, f64>> {
    let rest = url.strip_prefix("http://").unwrap_or(url);
    let host = rest.split('/').next().unwrap_or(rest);
    let scraped = async {
        let mut stream = TcpStream::connect(host).await?;
        let request = format!("GET /metrics HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(MOST).read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = tokio::time::timeout(PATIENCE, scraped)
        .await
        .context("the server tells no metrics")?
        .with_context(|| format!("{host} tells no metrics"))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    ensure!(
        head.split(' ').nth(1) == Some("200"),
        "{host} answers {:?}",
        head.lines().next().unwrap_or_default()
    );
    Ok(samples(body))
}

fn samples(page: &str) -> BTreeMap<String, f64> {
    page.lines()
        .filter(|line| !line.starts_with('#') && !line.contains("_bucket{"))
        .filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        })
        .collect()
}

/// What grew meanwhile by how much, and where gauges stand now.
pub(crate) fn change(
    before: &BTreeMap<String, f64>,
    after: BTreeMap<String, f64>,
) -> BTreeMap<String, f64> {
    after
        .into_iter()
        .map(|(name, value)| {
            let plain = name.split('{').next().unwrap_or(&name);
            let grows = ["_total", "_sum", "_count"]
                .iter()
                .any(|end| plain.ends_with(end));
            let began = before.get(&name).copied().unwrap_or_default();
            let value = if grows { value - began } else { value };
            (name, value)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_told_by_how_much_they_grew_and_gauges_as_they_are() {
        let before = samples("# TYPE a_total counter\na_total{code=\"OK\"} 2\nb 7\n");
        let after = samples("a_total{code=\"OK\"} 5\nb 3\nc_bucket{le=\"1\"} 4\nc_count 4\n");
        let change = change(&before, after);
        let of = |name: &str| change.get(name).copied();
        assert_eq!(of("a_total{code=\"OK\"}"), Some(3.0));
        assert_eq!((of("b"), of("c_count")), (Some(3.0), Some(4.0)));
        assert_eq!(change.len(), 3);
    }
}
