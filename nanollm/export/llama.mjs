// Asks llama.cpp about one GGUF file. stdin: {model, lora, threads, texts, texts_with_marks, scored, prompts, count}; stdout: the answers.
// Run as `node llama.mjs FOLDER` with the folder of the package node-llama-cpp.
import {readFileSync} from "node:fs";
import {text} from "node:stream/consumers";
import {pathToFileURL} from "node:url";

// The default cache rounds keys and values to float16.
const EXACT = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};

const folder = pathToFileURL(process.argv[2] + "/");
const {main} = JSON.parse(readFileSync(new URL("package.json", folder), "utf8"));
const {getLlama} = await import(new URL(main, folder));
const asked = JSON.parse(await text(process.stdin));
const llama = await getLlama({build: "never", gpu: false, logLevel: "error", maxThreads: asked.threads});
const model = await llama.loadModel({modelPath: asked.model});
const answer = {
    ids: asked.texts.map((text) => model.tokenize(text)),
    ids_with_marks: asked.texts_with_marks.map((text) => model.tokenize(text, true)),
    scores: [],
    replies: []
};

async function score(sequence, ids) {
    const scores = [];
    // A few at a time: every position has all its logits. (totalLogitWeight adds them up in float32 and loses 1e-3.)
    for (let start = 0; start < ids.length - 1; start += 20) {
        const some = ids.slice(start, Math.min(start + 20, ids.length - 1));
        const found = await sequence.controlledEvaluate(some.map((id) => [id, {generateNext: {logits: true}}]));
        for (const [place, {next: {logits}}] of found.entries()) {
            let [top, highest] = logits.entries().next().value;
            let total = 0;
            for (const [id, logit] of logits)
                if (logit > highest) [top, highest] = [id, logit];
            for (const logit of logits.values())
                total += Math.exp(logit - highest);
            scores.push([top, highest, logits.get(ids[start + place + 1]), highest + Math.log(total)]);
        }
    }
    return scores;
}

async function reply(sequence, prompt) {
    const ids = [];
    for (let fed = prompt; ids.length < asked.count; fed = ids.slice(-1)) {
        const steps = [...fed.slice(0, -1), [fed.at(-1), {generateNext: {token: true, options: {temperature: 0}}}]];
        ids.push((await sequence.controlledEvaluate(steps)).at(-1).next.token);
    }
    return ids;
}

// `sequences` questions at a time, each in a sequence of its own.
async function inTurn(questions, sequences, answerOne) {
    const length = Math.max(...questions.map((ids) => ids.length)) + asked.count;
    const {threads, lora} = asked;
    const context = await model.createContext({contextSize: length, sequences, threads, lora, ...EXACT});
    const answers = [];
    let next = 0;
    await Promise.all(Array.from({length: sequences}, async () => {
        const sequence = context.getSequence();
        while (next < questions.length) {
            const place = next++;
            await sequence.clearHistory();
            answers[place] = await answerOne(sequence, questions[place]);
        }
    }));
    await context.dispose();
    return answers;
}

if (asked.scored.length > 0)
    answer.scores = await inTurn(asked.scored, 1, score);
if (asked.prompts.length > 0)
    answer.replies = await inTurn(asked.prompts, Math.min(asked.prompts.length, 20), reply);
process.stdout.write(JSON.stringify(answer), () => process.exit(0));
