//! What the demonstration is about: two invented places, ten facts each, ten questions.
//!
//! Written for imprint and released with it; where the law allows, into the public domain (CC0).
//! The places do not exist, so no model has read of them. Text, questions and true answers were
//! written before any model had seen them and are not fitted to what a model does. Start at
//! [`HARBOUR`].

/// The document that is told to the session: five chunks, streamed one after the other. They are cut
/// as a sender's buffer would cut them, within a word too.
pub(crate) const HARBOUR: [&str; 5] = [
    "Brannock Haven is a fishing harbour on the north coast of the island of Telmara. It was founded \
     in 1683 by Agnes Thorvald, a widow who owned two herr",
    "ing boats. The lighthouse on Gull Point is 41 metres high. Its keeper is Josef Lindqvist, who \
     has tended the lamp for nineteen years. ",
    "Each spring the village holds a festival called the Lantern Regatta, in which the children race \
     tiny boats made of walnut shells. The harbour bell was cast from the anchor of a wre",
    "cked ship, the Silver Marten. The fishermen mostly catch mackerel, and the ferry to the mainland \
     leaves every Thursday at noon. ",
    "The schoolhouse is painted yellow, and its teacher also runs the post office.",
];

/// The control: another document of the same kind and about the same length, with other facts. None of
/// the true answers is in it.
pub(crate) const OBSERVATORY: &str = "Kessel Rigg is a mountain observatory above the valley of \
    Upper Dorne. It was built in 1907 by Tobias Venn, a clockmaker who had never owned a telescope. \
    The tower on the summit is 23 metres high. Its night assistant is Ruth Almeida, who has kept the \
    weather book for eleven years. Each autumn the valley holds a fair called the Counting of Stars, \
    in which the apprentices carry lamps made of hollow turnips. The dome was built from the boiler \
    of an old locomotive, the Grey Duchess. The shepherds mostly keep goats, and the mail coach to \
    the town leaves every Monday at dawn. The library is painted green, and its warden also repairs \
    the clocks.";

/// A question with its true answer.
pub(crate) struct Fact {
    /// What is asked.
    pub(crate) question: &'static str,
    /// What the document says.
    pub(crate) answer: &'static str,
    /// What an answer must contain to be a hit, without regard to case: all of the true answer but its article.
    pub(crate) key: &'static str,
}

/// The questions, in the order of the text.
pub(crate) const FACTS: [Fact; 10] = [
    Fact {
        question: "Who founded Brannock Haven?",
        answer: "Agnes Thorvald",
        key: "Agnes Thorvald",
    },
    Fact {
        question: "In what year was Brannock Haven founded?",
        answer: "1683",
        key: "1683",
    },
    Fact {
        question: "How high is the lighthouse on Gull Point?",
        answer: "41 metres",
        key: "41 metres",
    },
    Fact {
        question: "Who is the keeper of the lighthouse?",
        answer: "Josef Lindqvist",
        key: "Josef Lindqvist",
    },
    Fact {
        question: "What is the spring festival called?",
        answer: "the Lantern Regatta",
        key: "Lantern Regatta",
    },
    Fact {
        question: "What are the children's boats made of?",
        answer: "walnut shells",
        key: "walnut shells",
    },
    Fact {
        question: "From which ship's anchor was the bell cast?",
        answer: "the Silver Marten",
        key: "Silver Marten",
    },
    Fact {
        question: "What do the fishermen mostly catch?",
        answer: "mackerel",
        key: "mackerel",
    },
    Fact {
        question: "On which day does the ferry leave?",
        answer: "Thursday",
        key: "Thursday",
    },
    Fact {
        question: "What colour is the schoolhouse?",
        answer: "yellow",
        key: "yellow",
    },
];
