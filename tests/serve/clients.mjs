// The package `ai` with its OpenAI-compatible provider asks a server: a reply at once, the same as a stream, and an error.
// Run as `node clients.mjs URL MODEL FOLDER` with the folder of node_modules; prints one line of JSON.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, model, folder] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(createRequire(`${folder}/`).resolve(name)));
const [{ generateText, streamText }, { createOpenAICompatible }] = await Promise.all([load("ai"), load("@ai-sdk/openai-compatible")]);

const provider = createOpenAICompatible({ name: "nanollm", baseURL: `${url}/v1`, apiKey: "none", includeUsage: true });
const messages = [{ role: "user", content: "Once upon a time?" }];
const settings = { messages, temperature: 0, maxOutputTokens: 12, maxRetries: 0 };
const { text, finishReason, usage } = await generateText({ ...settings, model: provider(model) });
const stream = streamText({ ...settings, model: provider(model) });
let joined = "";
for await (const part of stream.textStream) joined += part;
const completion = await generateText({ ...settings, messages: undefined, prompt: "The", model: provider.completionModel(model) });
const error = await generateText({ ...settings, model: provider("other") }).catch((each) => each);
console.log(
  JSON.stringify({
    text, joined, finishReason, tokens: [usage.inputTokens, usage.outputTokens],
    streamed: (await stream.usage).outputTokens, completion: completion.text.length > 0, error: error.message,
  }),
);
