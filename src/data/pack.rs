//! Packing: which samples of an update share a micro-batch. It changes speed and memory and, to rounding, nothing else.

/// Spreads documents over micro-batches of at most `max_tokens` tokens: as few as best-fit-decreasing finds, then as
/// even as they get. Returns the documents of each micro-batch by their index in `lengths`, the longest first and equal
/// lengths side by side. A document longer than `max_tokens` gets a micro-batch to itself.
///
/// The result depends on the arguments alone.
pub fn micro_batches(lengths: &[usize], max_tokens: usize) -> Vec<Vec<usize>> {
    let mut by_length: Vec<usize> = (0..lengths.len()).collect();
    by_length.sort_by_key(|&document| std::cmp::Reverse(lengths[document]));
    let tight = best_fit(lengths, &by_length, max_tokens);
    let even = even_out(lengths, &by_length, tight.len(), max_tokens);
    even.unwrap_or(tight)
}

/// Puts each document where the least room would be left.
fn best_fit(lengths: &[usize], by_length: &[usize], max_tokens: usize) -> Vec<Vec<usize>> {
    let mut batches: Vec<(usize, Vec<usize>)> = Vec::new();
    for &document in by_length {
        let fits = |held: usize| held.saturating_add(lengths[document]) <= max_tokens;
        let best = batches.iter_mut().filter(|(held, _)| fits(*held)).max_by_key(|(held, _)| *held);
        match best {
            Some((held, batch)) => {
                *held += lengths[document];
                batch.push(document);
            }
            None => batches.push((lengths[document], vec![document])),
        }
    }
    batches.into_iter().map(|(_, batch)| batch).collect()
}

/// Puts each document, the longest first, into the emptiest of `n` micro-batches; `None` if one overflows.
fn even_out(lengths: &[usize], by_length: &[usize], n: usize, max_tokens: usize) -> Option<Vec<Vec<usize>>> {
    let mut batches = vec![(0, Vec::new()); n];
    for &document in by_length {
        let (held, batch) = batches.iter_mut().min_by_key(|(held, _)| *held)?;
        *held += lengths[document];
        if *held > max_tokens {
            return None;
        }
        batch.push(document);
    }
    Some(batches.into_iter().map(|(_, batch)| batch).collect())
}

/// Spreads documents over the ranks of a job so that each has about as many tokens. Returns the documents of one rank by
/// their index in `lengths`, in that order.
///
/// The result depends on the arguments alone, so that every rank knows what the others have.
pub fn share(lengths: &[usize], rank: usize, world_size: usize) -> Vec<usize> {
    let mut by_length: Vec<usize> = (0..lengths.len()).collect();
    by_length.sort_by_key(|&document| std::cmp::Reverse(lengths[document]));
    let mut held = vec![0; world_size];
    let mut own = Vec::new();
    for document in by_length {
        // The first of equally loaded ranks, so that it is the same one everywhere.
        let lightest = (0..world_size).min_by_key(|&rank| held[rank]).unwrap_or_default();
        held[lightest] += lengths[document];
        if lightest == rank {
            own.push(document);
        }
    }
    own.sort_unstable();
    own
}
