// llama.cpp, driven line by line: a request in JSON on stdin, an answer in JSON on stdout.
//
//     node llama_cpp.mjs MODEL.gguf THREADS
//
// {"op":"prefill","prompts":[[ids], ...]} reads prompts side by side; {"op":"decode","prompt":[ids],"batch":B,"tokens":N} reads the prompt into B
// sequences and then times N greedy tokens of each, all side by side. Answers are {"seconds","tokens"}; times are of the work
// alone. Written to be run by the crate `bench`, which installs node-llama-cpp beside this file.
import {createInterface} from "node:readline";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [path, threadsText] = process.argv.slice(2);
const threads = Number(threadsText);
const say = (answer) => process.stdout.write(JSON.stringify(answer) + "\n");

const llama = await getLlama({
    gpu: false,
    build: "never",
    skipDownload: true,
    progressLogs: false,
    logLevel: LlamaLogLevel.error,
    maxThreads: threads,
});
const model = await llama.loadModel({modelPath: path});
const contexts = new Map();

// Contexts are made once per batch: 1024 tokens of each sequence, up to 512 tokens in one llama.cpp batch.
async function sequencesOf(batch) {
    if (!contexts.has(batch)) {
        const context = await model.createContext({
            contextSize: 1024,
            sequences: batch,
            batchSize: 512,
            threads: {ideal: threads, min: threads},
        });
        contexts.set(batch, Array.from({length: batch}, () => context.getSequence()));
    }
    const sequences = contexts.get(batch);
    await Promise.all(sequences.map((sequence) => sequence.clearHistory()));
    return sequences;
}

async function decode(sequence, last, tokens) {
    let count = 0;
    for await (const token of sequence.evaluate([last], {temperature: 0, yieldEogToken: true})) {
        void token;
        count += 1;
        if (count === tokens) break;
    }
    return count;
}

const operations = {
    async prefill({prompts}) {
        const sequences = await sequencesOf(prompts.length);
        const start = performance.now();
        await Promise.all(sequences.map((sequence, i) => sequence.evaluateWithoutGeneratingNewTokens(prompts[i])));
        return {seconds: (performance.now() - start) / 1e3, tokens: prompts.flat().length};
    },
    async decode({prompt, batch, tokens}) {
        const sequences = await sequencesOf(batch);
        for (const sequence of sequences) await sequence.evaluateWithoutGeneratingNewTokens(prompt.slice(0, -1));
        const start = performance.now();
        const counts = await Promise.all(sequences.map((sequence) => decode(sequence, prompt.at(-1), tokens)));
        return {seconds: (performance.now() - start) / 1e3, tokens: counts.reduce((sum, count) => sum + count, 0)};
    },
};

say({ready: `llama.cpp ${llama.llamaCppRelease.release} (node-llama-cpp), ${threads} threads`});
for await (const line of createInterface({input: process.stdin})) {
    try {
        const request = JSON.parse(line);
        say(await operations[request.op](request));
    } catch (error) {
        say({error: String(error)});
    }
}
process.exit(0);
