//! Tokens drawn on the device are those that the host draws of its logits, whatever is asked for; what it does not know the host draws.

use device::Accelerator;
use engine::{
    Base, Chosen, Command, Config, Draw, Engine, Error, Event, Machine, RequestId, Sampling, Slot,
    TenantId, TokenId,
};
use generator::{Core, Generator, State};
use lm::Row;

use crate::{MODELS, config, one, software, text};

fn accelerator(config: &Config) -> Accelerator {
    software(&MODELS.base, &MODELS.associative, config)
}

/// The same machine, none of whose tokens it draws itself.
struct ByHost(Accelerator);

impl Machine for ByHost {
    fn base(&self) -> &Base {
        self.0.base()
    }

    fn generator(&self) -> Option<&Generator> {
        self.0.generator()
    }

    fn forward(&mut self, rows: &mut [Row<'_>], slots: &[Option<Slot>]) -> Result<Vec<f32>, Error> {
        self.0.forward(rows, slots)
    }

    fn announce(&mut self, slot: Slot, core: &Core) -> Result<(), Error> {
        self.0.announce(slot, core)
    }

    fn free(&mut self, slot: Slot) -> Result<(), Error> {
        self.0.free(slot)
    }

    fn traces(&self) -> bool {
        self.0.traces()
    }

    fn gather(&self, state: &mut State) -> Result<(), generator::Error> {
        self.0.gather(state)
    }

    fn land(&self, state: &mut State) -> Result<(), generator::Error> {
        self.0.land(state)
    }

    fn read_out(&self, state: &State) -> Result<Core, generator::Error> {
        self.0.read_out(state)
    }
}

fn samplings() -> Vec<Sampling> {
    let warm = Sampling {
        temperature: 0.9,
        seed: 3,
        ..Sampling::default()
    };
    vec![
        Sampling::default(),
        Sampling {
            logprobs: true,
            ..warm.clone()
        },
        Sampling {
            temperature: 3.0,
            top_k: 5,
            ..warm.clone()
        },
        Sampling {
            top_p: 0.6,
            ..warm.clone()
        },
        Sampling {
            min_p: 0.2,
            seed: 9,
            ..warm.clone()
        },
        Sampling {
            top_k: 40,
            top_p: 0.9,
            min_p: 0.01,
            repetition_penalty: 1.4,
            logprobs: true,
            ..warm.clone()
        },
        // Beyond what the device draws.
        Sampling {
            top_logprobs: 2,
            ..warm.clone()
        },
    ]
}

/// The tokens and log-probabilities of an answer of each sampling.
fn answers(machine: impl Machine + 'static) -> Vec<Vec<(TokenId, Option<f32>)>> {
    let mut engine = Engine::on(config(), |_| Ok(Box::new(machine))).unwrap();
    let all = samplings();
    for (i, sampling) in all.iter().enumerate() {
        let command = Command::Generate {
            request: RequestId(i as u64),
            tenant: TenantId(0),
            session: None,
            adapter_scale: 1.0,
            chosen: Chosen::default(),
            prompt: text(3 + i as u32, 4 + i),
            max_tokens: 8,
            sampling: sampling.clone(),
            eos: Vec::new(),
        };
        engine.push(command).unwrap();
    }
    let (mut events, now) = (Vec::new(), std::time::Instant::now());
    while !engine.idle() {
        engine.step(|| now, &mut events).unwrap();
    }
    let of = |request: usize| {
        let tokens = events.iter().filter_map(|event| match event {
            Event::Token {
                request: of,
                token,
                logprob,
                ..
            } if of.0 == request as u64 => Some((*token, *logprob)),
            _ => None,
        });
        tokens.collect()
    };
    (0..all.len()).map(of).collect()
}

#[test]
fn tokens_that_the_device_draws_are_those_that_the_host_draws_of_its_logits() {
    let _one = one();
    let drawn = answers(accelerator(&config()));
    let by_host = answers(ByHost(accelerator(&config())));
    for ((sampling, drawn), by_host) in samplings().iter().zip(&drawn).zip(&by_host) {
        assert_eq!(drawn.len(), 8);
        for (drawn, by_host) in drawn.iter().zip(by_host) {
            assert_eq!(drawn.0, by_host.0, "{sampling:?}");
            match (drawn.1, by_host.1) {
                (Some(drawn), Some(by_host)) => assert!((drawn - by_host).abs() < 1e-5),
                (drawn, by_host) => assert_eq!(drawn, by_host, "{sampling:?}"),
            }
        }
    }
}

#[test]
fn of_rows_that_are_drawn_no_logits_leave_the_device() {
    let _one = one();
    let mut machine = accelerator(&config());
    let tokens = text(1, 3);
    let (sampling, seen) = (Sampling::default(), std::collections::HashSet::new());
    let draw = Draw {
        sampling: &sampling,
        point: 0.0,
        seen: &seen,
    };
    let row = |blocks, logits| Row {
        tokens: &tokens,
        position: 0,
        blocks,
        core: None,
        scale: 1.0,
        window: None,
        lookahead: None,
        logits,
    };
    let mut rows = [row(&[0], 1), row(&[1], 2), row(&[2], 0), row(&[3], 1)];
    let output = machine
        .forward_and_draw(&mut rows, &[None; 4], &[Some(draw), None, None, None])
        .unwrap();
    assert_eq!(output.logits.len(), 3 * 96);
    let largest = |logits: &[f32]| {
        let places = 0..logits.len();
        places.max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
    };
    // The last of the three rows is the one that was drawn.
    let likeliest = largest(&output.logits[2 * 96..]).unwrap();
    assert_eq!(
        output.drawn,
        [Some((TokenId(likeliest as u32), None)), None, None, None]
    );
    assert_eq!(output.logits[96..2 * 96], output.logits[2 * 96..]);
}
