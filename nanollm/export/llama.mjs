// Asks llama.cpp about one GGUF file. stdin: {model, threads, texts, texts_with_marks, scored, prompts, count}; stdout: the answers.
// Run as `node llama.mjs FOLDER` with the folder of the package node-llama-cpp.
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

// The default cache rounds keys and values to float16.
const EXACT = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};

const folder = pathToFileURL(process.argv[2] + "/");
const {main} = JSON.parse(readFileSync(new URL("package.json", folder), "utf8"));
const {getLlama} = await import(new URL(main, folder));
const asked = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({build: "never", gpu: false, logLevel: "error", maxThreads: asked.threads});
const model = await llama.loadModel({modelPath: asked.model});
const answer = {
    release: llama.llamaCppRelease.release,
    ids: asked.texts.map((text) => model.tokenize(text)),
    ids_with_marks: asked.texts_with_marks.map((text) => model.tokenize(text, true)),
    scores: [],
    replies: []
};

if (asked.scored.length + asked.prompts.length > 0) {
    const context = await model.createContext({contextSize: model.trainContextSize, threads: asked.threads, ...EXACT});
    const sequence = context.getSequence();
    for (const ids of asked.scored) {
        await sequence.clearHistory();
        const steps = ids.slice(0, -1).map((id, place) => [id, {generateNext: {
            totalLogitWeight: true,
            logits: {filter: {tokens: [ids[place + 1]], includeTop: 1}}
        }}]);
        const found = await sequence.controlledEvaluate(steps);
        answer.scores.push(found.map(({next}, place) => {
            const [top, highest] = [...next.logits].reduce((best, pair) => pair[1] > best[1] ? pair : best);
            return [top, highest, next.logits.get(ids[place + 1]), highest + Math.log(next.totalLogitWeight)];
        }));
    }
    for (const prompt of asked.prompts) {
        await sequence.clearHistory();
        const reply = [];
        for (let fed = prompt; reply.length < asked.count; fed = reply.slice(-1)) {
            const steps = [...fed.slice(0, -1), [fed.at(-1), {generateNext: {token: true, options: {temperature: 0}}}]];
            reply.push((await sequence.controlledEvaluate(steps)).at(-1).next.token);
        }
        answer.replies.push(reply);
    }
}
process.stdout.write(JSON.stringify(answer), () => process.exit(0));
