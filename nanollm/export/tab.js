/* The page's requests, answered in this tab: llama.cpp as WebAssembly. An export for the web has this as server.js.
 *
 * model.json, which the export wrote, tells of the model: {id, context_length, examples, marks, file, bytes,
 * edition}. What is large is put into the browser's cache from here, so that it comes once and its progress can be told;
 * the page itself is kept by offline.js.
 */

import { Wllama } from "../wllama/index.min.js";
import { Trouble, sentence, tooLong } from "./trouble.js";

// (module (func (result v128) i32.const 0 i8x16.splat i8x16.popcnt))
const SIMD = Uint8Array.of(
    ...[0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0],
    ...[10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11],
);
const MOST_THREADS = 4; // they wait for each other in loops: more, or one for each core, are slower
const SAMPLERS = ["temperature", "top_k", "top_p"]; // as NanoLLM samples; llama.cpp has others, and their defaults
const HALF = "A likely token here is half a character, which wllama cannot tell. Ask again without looking inside.";

let engine = null; // what becomes {wllama, model}

/** The model that answers: {id, context_length, examples}. tell(words) hears how far it is loaded. */
export async function readModel(tell) {
    engine ??= start(tell);
    try {
        return (await engine).model;
    } catch (error) {
        engine = null; // it may succeed next time
        throw error;
    }
}

/** The chunks of a reply and when they came, {chunk, at_ms}, until it is over; AbortError when it was stopped. */
export async function* streamReply({ model: name, experts, max_tokens, ...request }, signal) {
    const { wllama, model } = await engine;
    const mark = model.marks.find((each) => request.messages.some(({ content }) => content.includes(each)));
    if (mark) throw new Trouble("The model cannot be asked this.", `The message spells the mark ${mark}; change it.`);
    const asked = { ...request, samplers: SAMPLERS, max_tokens: max_tokens ?? -1, abortSignal: signal };
    const options = { ...asked, stream: true, stream_options: { include_usage: true } };
    try {
        for await (const chunk of await wllama.createChatCompletion(options)) yield { chunk, at_ms: performance.now() };
    } catch (error) {
        if (error.name === "AbortError") throw error;
        if (/context/.test(error.message)) throw tooLong(error.message);
        if (request.logprobs && /typed array/.test(error.message)) throw new Trouble("The rest cannot be looked into.", HALF);
        throw new Trouble("The model could not answer.", sentence(error.message));
    }
}

async function start(tell = () => {}) {
    if (!globalThis.WebAssembly?.validate(SIMD)) {
        throw new Trouble("This browser cannot run the model.", "It lacks WebAssembly with SIMD; a newer one has it.");
    }
    keepPage();
    const model = await (await get("model.json")).json();
    const quiet = { debug() {}, log() {}, warn() {}, error: console.info };
    const make = (wasm, worker, compatible) => {
        const options = { suppressNativeLog: true, logger: quiet, cacheManager: {} }; // over http it cannot make its own
        const wllama = new Wllama({ default: wasm }, options);
        wllama.setCompat({ worker, wasm: compatible }); // for Safari and older browsers; by default from elsewhere
        return wllama;
    };
    const probe = make(...["wllama.wasm", "compat.js", "compat.wasm"].map((name) => at(`wllama/${name}`)));
    const { wasmPath, jsPath } = probe.getWorkerResources();
    const wasm = URL.createObjectURL(await load(wasmPath, model));
    const code = jsPath ? await (await load(jsPath, model)).text() : "";
    const wllama = make(wasm, { code }, wasm);
    const weights = await load(at(model.file), model, (bytes) => {
        tell(`The model is loading: ${Math.floor((100 * bytes) / model.bytes)} % of ${megabytes(model.bytes)} MB.`);
    });
    await wllama.loadModel([weights], {
        n_ctx: model.context_length,
        n_parallel: 1,
        n_gpu_layers: 0,
        n_threads: Math.min(MOST_THREADS, Math.ceil(navigator.hardwareConcurrency / 2)), // without isolation it is 1
        ...{ cache_type_k: "f32", cache_type_v: "f32", flash_attn: false }, // which rounds to float16
        ...{ skip_chat_parsing: true, reasoning_format: "none", warmup: false },
    });
    return { wllama, model };
}

/** Let the browser keep the page for when there is no network. It does so over https and from this machine only. */
function keepPage() {
    const registered = navigator.serviceWorker?.register(at("offline.js"));
    registered?.catch((error) => console.info(`the page will not be there without a network: ${error.message}`));
}

/** A file as a Blob, from the browser's cache if it is there; hear(bytes) is called while it comes. */
async function load(address, model, hear = () => {}) {
    const cache = await globalThis.caches?.open(`${at("")} ${model.edition}`); // there is none over http from another machine
    const kept = await cache?.match(address);
    if (kept) return kept.blob();
    const response = await get(address);
    const reader = response.body.getReader();
    const parts = [];
    let bytes = 0;
    for (let part; !(part = await reader.read()).done; ) {
        parts.push(part.value);
        bytes += part.value.length;
        hear(bytes);
    }
    const blob = new Blob(parts, { type: address.endsWith(".wasm") ? "application/wasm" : "" });
    const put = cache?.put(address, new Response(blob));
    put?.catch((error) => console.info(`${address} is loaded anew next time: ${error.message}`));
    return blob;
}

async function get(address) {
    const response = await fetch(at(address)).catch((error) => {
        throw new Trouble("The model cannot be loaded.", sentence(error.message));
    });
    if (!response.ok) throw new Trouble("The model cannot be loaded.", `${at(address)} answers ${response.status}.`);
    return response;
}

function at(address) {
    return new URL(address, new URL("../", import.meta.url)).href;
}

function megabytes(bytes) {
    return (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
}
