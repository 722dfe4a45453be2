//! A server's inside without an engine: what it says to the engine's thread is read by the test, which answers or does not.
//!
//! So a test can hold any moment for as long as it likes. Start at [`Rig`].

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use engine::{
    Command, Digest, GeneratorInfo, ModelInfo, Newest, ReadOut, Seq, Strategy, Version, Write,
};
use lm::text::Text;
use tempfile::TempDir;
use testkit::{TinySpec, tiny_base};
use tokio::sync::{mpsc, watch};

use crate::{
    auth::Tenant,
    edge::Phase,
    engine_thread::{Attach, Handle, Link, Message},
    grpc::Shared,
    metrics::Metrics,
    places::Places,
    sessions::{About, Rules, Session, Sessions, Wanted},
    states::States,
};

/// Messages that the engine's thread leaves unread.
const MAILBOX: usize = 4;

pub(crate) struct Rig {
    pub(crate) shared: Arc<Shared>,
    pub(crate) messages: mpsc::Receiver<Message>,
    _alive: (TempDir, watch::Sender<Phase>, watch::Sender<bool>),
}

impl Rig {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        tiny_base(folder.path(), &TinySpec::default());
        let text = Text::load(folder.path()).unwrap();
        let (mailbox, messages) = mpsc::channel(MAILBOX);
        let (phase, phases) = watch::channel(Phase::Running);
        let (flag, broken) = watch::channel(false);
        let handle = Handle::new(mailbox, Arc::new(model()), broken);
        let rules = Rules {
            chunk_bytes: 1 << 10,
            session_tokens: 1 << 10,
            concat_tokens: 16,
            documents: 16,
            waiting_tokens: 64,
            unread_tokens: 1 << 10,
            states: States::new(1 << 10, 1),
            idle_publish: None,
            vocab: 288,
            bos: None,
            document_suffix: "\n\n".to_owned(),
        };
        let log = Arc::new(store::Memory::new(store::Limits::default()));
        let sessions = Sessions::new(handle.clone(), text.clone(), log, rules, 16);
        let places = |what| Arc::new(Places::new(16, 16, what));
        let shared = Arc::new(Shared {
            sessions,
            engine: handle,
            text,
            model: "tiny".to_owned(),
            prompt_bytes: 1 << 10,
            wait: Duration::from_secs(60),
            open_wait: Duration::from_secs(60),
            metrics: Arc::new(Metrics::new("tiny")),
            requests: places("requests"),
            streams: places("ingest streams"),
            phase: phases,
            next_request: AtomicU64::new(1),
        });
        Self {
            shared,
            messages,
            _alive: (folder, phase, flag),
        }
    }

    /// The next command, and the session that begins with it.
    pub(crate) async fn next(&mut self) -> (Command, Option<Arc<Link>>) {
        let message = tokio::time::timeout(Duration::from_secs(20), self.messages.recv());
        let Message { command, attach } = message.await.unwrap().unwrap();
        let link = match attach {
            Attach::Session(link) => Some(link),
            Attach::Nobody | Attach::Request(..) | Attach::Forget(_) => None,
        };
        (command, link)
    }

    /// Says that the session which begins next is open.
    pub(crate) async fn open(&mut self) {
        loop {
            match self.next().await {
                // Of a session that was before.
                (Command::Close { .. }, _) => {}
                (Command::Open { .. } | Command::Fork { .. }, link) => {
                    return opened(&link.unwrap());
                }
                (command, _) => panic!("{command:?}"),
            }
        }
    }

    /// A session that is open.
    pub(crate) async fn session(&mut self, ttl: Option<Duration>) -> Arc<Session> {
        let shared = Arc::clone(&self.shared);
        let wanted = Wanted {
            strategy: Strategy::Parallel,
            window: 8,
            labels: About::new(Default::default(), None).labels,
            ttl,
        };
        let create = tokio::spawn(async move {
            let tenant = tenant();
            shared.sessions.create(&tenant, "", wanted).await.unwrap()
        });
        self.open().await;
        create.await.unwrap()
    }
}

/// Who calls.
pub(crate) fn tenant() -> Tenant {
    Tenant::new("acme")
}

fn opened(link: &Link) {
    let newest = Newest {
        seq: Seq(0),
        version: Version(0),
        digest: Digest([0; 32]),
        tokens: 0,
        state_bytes: 0,
        trace_bytes: 0,
        core_bytes: 0,
    };
    link.progress
        .send_modify(|progress| progress.newest = Some(newest));
}

fn model() -> ModelInfo {
    let generator = GeneratorInfo {
        write: Write::Associative,
        read_out: ReadOut::Ridge,
        sites: Vec::new(),
        window: 8,
        strategy: Strategy::Parallel,
        digest: String::new(),
        parameters: 0,
        prompt_format: None,
        document_suffix: "\n\n".to_owned(),
        bos: None,
        state_bytes: 1,
    };
    ModelInfo {
        architecture: engine::Architecture::Llama,
        parameters: 0,
        layers: 2,
        hidden: 32,
        vocab: 288,
        context_length: 512,
        weight_format: String::new(),
        digest: String::new(),
        eos: Vec::new(),
        bos: None,
        generator: Some(generator),
    }
}
