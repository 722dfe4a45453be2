//! The cache of tokens: a file that is either whole or not there.
//!
//! Numbers as u32, little-endian, behind a digest of them all; a file that does not agree with its digest is as good
//! as none. Start at [`read`].

use std::{fs, io, path::Path};

use lm::text::TokenId;

use super::{Asked, Pool, Question, Split, Told};
use crate::files::write_whole;

/// Changes with the format and with what is kept.
const MAGIC: &[u8; 8] = b"imptok02";

/// What the file holds; `None` if it is not there or not whole.
pub(super) fn read(path: &Path) -> Option<Pool> {
    let bytes = fs::read(path).ok()?;
    let (magic, rest) = bytes.split_first_chunk::<8>()?;
    let (digest, rest) = rest.split_first_chunk::<32>()?;
    if magic != MAGIC || blake3::hash(rest).as_bytes() != digest {
        return None;
    }
    let words = rest
        .as_chunks::<4>()
        .0
        .iter()
        .map(|word| u32::from_le_bytes(*word));
    let mut words = Words(words);
    let told = Told {
        rows: words.long()?,
        malformed: words.long()?,
        held_out: words.long()?,
    };
    let (train, validation) = (words.split()?, words.split()?);
    Some(Pool {
        train,
        validation,
        told,
    })
}

struct Words<I>(I);

impl<I: Iterator<Item = u32>> Words<I> {
    fn long(&mut self) -> Option<u64> {
        let low = u64::from(self.0.next()?);
        Some(low | u64::from(self.0.next()?) << 32)
    }

    fn tokens(&mut self) -> Option<Vec<TokenId>> {
        let count = self.0.next()?;
        (0..count).map(|_| self.0.next().map(TokenId)).collect()
    }

    fn split(&mut self) -> Option<Split> {
        let pieces = self.0.next()?;
        let pieces = (0..pieces).map(|_| self.tokens()).collect::<Option<_>>()?;
        Some(Split {
            pieces,
            asked: self.all_asked()?,
            dialogues: self.all_asked()?,
            fewshot: self.all_asked()?,
        })
    }

    fn all_asked(&mut self) -> Option<Vec<Asked>> {
        let count = self.0.next()?;
        (0..count).map(|_| self.asked()).collect()
    }

    fn asked(&mut self) -> Option<Asked> {
        let context = self.tokens()?;
        let questions = self.0.next()?;
        let question = |_| {
            let scored = self.0.next()? as usize;
            let tokens = self.tokens()?;
            Some(Question { tokens, scored })
        };
        let questions = (0..questions).map(question).collect::<Option<_>>()?;
        Some(Asked { context, questions })
    }
}

/// Keeps the pool.
pub(super) fn write(path: &Path, pool: &Pool) -> io::Result<()> {
    let mut body = Vec::new();
    let mut word = |word: usize| body.extend((word as u32).to_le_bytes());
    let Told {
        rows,
        malformed,
        held_out,
    } = pool.told;
    for count in [rows, malformed, held_out] {
        word(count as usize & 0xffff_ffff);
        word((count >> 32) as usize);
    }
    for split in [&pool.train, &pool.validation] {
        put(split, &mut word);
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend(blake3::hash(&body).as_bytes());
    bytes.extend(body);
    write_whole(path, &bytes)
}

fn put(split: &Split, word: &mut impl FnMut(usize)) {
    word(split.pieces.len());
    for piece in &split.pieces {
        put_tokens(piece, word);
    }
    for asked in [&split.asked, &split.dialogues, &split.fewshot] {
        word(asked.len());
        for Asked { context, questions } in asked {
            put_tokens(context, word);
            word(questions.len());
            for question in questions {
                word(question.scored);
                put_tokens(&question.tokens, word);
            }
        }
    }
}

fn put_tokens(tokens: &[TokenId], word: &mut impl FnMut(usize)) {
    word(tokens.len());
    tokens.iter().for_each(|token| word(token.0 as usize));
}
