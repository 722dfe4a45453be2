//! Rest: what of a session may leave memory, and how it comes back.
//!
//! A session at rest is told nothing and asks for nothing. Its sums and traces leave first, its core after them; its log (tokens,
//! 4 bytes each) and its name of what they make stay. What has left comes back from a [`Snapshot`], or the log is read again from
//! its start: both give the same bits, as sums, traces and cores follow from the log alone. Start at [`Session::at_rest`].

use generator::{Generator, State, Strategy};

use super::{Asks, Barrier, Context, Session, versions::core_of};
use crate::{
    command::Chosen,
    cores::{CoreBudget, HeldCore},
    ids::Version,
    machine::Machine,
    snapshot::{Kept, Need, Snapshot, SnapshotError, Sums},
    traces::TraceBudget,
};

impl Session {
    /// Whether nothing is open, unread or owed: all that it holds follows from its log.
    pub(crate) fn at_rest(&self) -> bool {
        self.failed.is_none()
            && self.unmade.is_none()
            && self.tail.is_none()
            && self.reading.is_none()
            && self.barriers.is_empty()
            && self.current == self.documents.len()
            && !self.due
    }

    /// What has left memory.
    pub(crate) fn gone(&self) -> Need {
        self.gone
    }

    /// Whether it is being read again because something had left.
    pub(crate) fn is_rereading(&self) -> bool {
        let front = self.barriers.front();
        front.is_some_and(|barrier| matches!(barrier.asks, Asks::Remade))
    }

    /// Whether its newest version is of all that it was told: without its core it can be made again.
    pub(crate) fn is_current(&self) -> bool {
        self.digest_with(None).0 == self.newest.digest
    }

    /// Lets sums and traces go. The core stays.
    pub(crate) fn leave_host(&mut self, generator: &Generator) -> Result<(), generator::Error> {
        self.folded = generator.new_state()?;
        self.newest.sums = None;
        for document in &mut self.documents {
            document.traced = document.trace.take().is_some();
            document.state = None;
        }
        self.gone.sums = !self.documents.is_empty();
        Ok(())
    }

    /// Lets the core go, too.
    pub(crate) fn leave_slot(&mut self) {
        let core = self.newest.core.take();
        self.gone.core = core.is_some();
        if let Some(core) = core {
            core.leave();
        }
    }

    /// Whether its next version takes a slot, rather than that of the newest one.
    pub(crate) fn takes_slot(&self) -> bool {
        let core = self.newest.core.as_ref();
        self.failed.is_none() && core.is_none_or(|core| !core.is_alone())
    }

    /// What a request that is made of this needs and is not there.
    pub(crate) fn lacks(&self, chosen: &Chosen) -> Need {
        if self.newest.version == Version(0) {
            return Need::default();
        }
        Need {
            core: self.gone.core,
            sums: self.gone.sums && self.composes(chosen),
        }
    }

    /// Whether a core is made for such a request, of documents' own sums or traces.
    pub(crate) fn composes(&self, chosen: &Chosen) -> bool {
        if chosen.parts.is_empty() {
            return chosen.gated;
        }
        if self.strategy == Strategy::Sequential {
            return false;
        }
        let (mut named, mut whole) = (0, true);
        for document in &self.documents {
            let part = chosen
                .parts
                .iter()
                .find(|part| part.document == document.id);
            if let Some(part) = part {
                named += 1;
                whole &= part.tokens.is_empty() || !(document.traced || document.trace.is_some());
            }
        }
        named == chosen.parts.len() && !(whole && named == self.documents.len())
    }

    /// Tokens of its log.
    pub(crate) fn tokens(&self) -> usize {
        let documents = self.documents.iter();
        documents.map(|document| document.tokens.len()).sum()
    }

    /// Tokens of documents whose traces come back with them.
    pub(crate) fn traced_tokens(&self) -> usize {
        let traced = self.documents.iter().filter(|document| document.traced);
        traced.map(|document| document.tokens.len()).sum()
    }

    /// What is worth keeping of it while it is away, at so many bytes a token of its log: reading the log again costs time in
    /// proportion to its tokens.
    pub(crate) fn snapshot(
        &self,
        bytes_per_token: usize,
        machine: &dyn Machine,
    ) -> Option<Snapshot> {
        if !self.at_rest() || self.gone.core || !self.is_current() {
            return None;
        }
        let most = self.tokens().saturating_mul(bytes_per_token);
        let core = self.newest.core.as_ref();
        let core = core.filter(|core| core.bytes() <= most);
        let core = core.map(HeldCore::to_be_written);
        let bytes = self.state_bytes().saturating_add(self.trace_bytes());
        // Of a session that was told nothing there is nothing to keep.
        let sums = (bytes > 0 && bytes <= most && !self.gone.sums).then(|| self.sums(machine));
        let sums = sums.and_then(Result::ok);
        (core.is_some() || sums.is_some()).then(|| Snapshot::of(self.newest.digest, core, sums))
    }

    fn sums(&self, machine: &dyn Machine) -> Result<Sums, generator::Error> {
        let sequential = self.strategy == Strategy::Sequential;
        let landed = |state: &State| {
            let mut state = state.try_clone()?;
            machine.land(&mut state)?;
            Ok::<_, generator::Error>(state)
        };
        let documents = self.documents.iter().map(|document| {
            let state = document.state.as_ref().map(landed).transpose()?;
            Ok((state, document.trace.clone().map(Kept::Held)))
        });
        Ok(Sums {
            folded: sequential.then(|| landed(&self.folded)).transpose()?,
            documents: documents.collect::<Result<_, generator::Error>>()?,
        })
    }

    /// Takes back what a snapshot holds of what has left.
    pub(crate) fn install(
        &mut self,
        snapshot: Snapshot,
        (generator, machine): (&Generator, &dyn Machine),
        cores: &CoreBudget,
        traces: &TraceBudget,
    ) -> Result<(), SnapshotError> {
        if snapshot.digest() != self.newest.digest {
            return Err(SnapshotError::Foreign {
                detail: format!("of state {}, not {}", snapshot.digest(), self.newest.digest),
            });
        }
        let (core, sums) = snapshot.into_parts();
        if let Some(sums) = sums.filter(|_| self.gone.sums) {
            self.install_sums(&sums, generator, traces)?;
            self.gone.sums = false;
        }
        if let Some(core) = core.filter(|_| self.gone.core) {
            generator.check_core(&core)?;
            self.newest.core = Some(cores.hold(core));
            self.gone.core = false;
        }
        if self.gone.core && !self.gone.sums {
            self.recore(machine, cores)?;
        }
        Ok(())
    }

    fn install_sums(
        &mut self,
        sums: &Sums,
        generator: &Generator,
        traces: &TraceBudget,
    ) -> Result<(), SnapshotError> {
        let Sums { folded, documents } = sums;
        let sequential = self.strategy == Strategy::Sequential;
        let fits = folded.is_some() == sequential
            && documents.len() == self.documents.len()
            && (self.documents.iter().zip(documents)).all(|(mine, (state, trace))| {
                state.is_none() == sequential && trace.is_some() == mine.traced
            });
        if !fits {
            return Err(SnapshotError::Foreign {
                detail: "of other documents".to_owned(),
            });
        }
        let states = documents.iter().filter_map(|(state, _)| state.as_ref());
        for state in states.chain(folded) {
            generator.check_state(state)?;
        }
        for trace in documents.iter().filter_map(|(_, trace)| trace.as_ref()) {
            generator.check_trace(trace.trace())?;
        }
        let mut total = match folded {
            Some(folded) => folded.try_clone()?,
            None => generator.new_state()?,
        };
        for (state, _) in documents {
            if let Some(state) = state.as_ref().filter(|state| !state.is_empty()) {
                total.add(state, 1.0)?;
            }
        }
        for (mine, (state, trace)) in self.documents.iter_mut().zip(documents) {
            mine.state = state.as_ref().map(State::try_clone).transpose()?;
            let trace = trace.as_ref().map(Kept::trace).cloned();
            mine.trace = trace.map(|trace| traces.hold_anyway(trace));
        }
        self.folded = total;
        Ok(())
    }

    /// Reads the newest version's core out of the sums again.
    fn recore(
        &mut self,
        machine: &dyn Machine,
        cores: &CoreBudget,
    ) -> Result<(), generator::Error> {
        let core = core_of(&self.folded, machine)?;
        self.newest.core = core.map(|core| cores.hold(core));
        self.gone.core = false;
        Ok(())
    }

    /// Begins to read the log again from its start; nothing is published for it.
    pub(crate) fn reread(&mut self) {
        self.current = 0;
        let place = self.log_end();
        self.barriers.push_front(Barrier {
            place,
            asks: Asks::Remade,
        });
    }

    /// The log has been read again: all is as it was.
    pub(super) fn remade(&mut self, cx: &Context<'_>) -> Result<(), generator::Error> {
        if self.gone.core {
            self.recore(cx.machine, cx.cores)?;
        }
        self.gone = Need::default();
        self.due = false;
        Ok(())
    }

    /// The log could not be read again: what has left is still away.
    pub(super) fn not_remade(&mut self, reason: &str, cx: &mut Context<'_>) {
        self.drop_reading(cx.allocator);
        self.barriers.clear();
        self.current = self.documents.len();
        self.due = false;
        for document in &mut self.documents {
            (document.state, document.trace) = (None, None);
        }
        self.unmade = Some(reason.to_owned());
    }
}
