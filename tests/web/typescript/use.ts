// What a developer writes with the generated types; each line that tsc refuses is a fault of the
// API's description.
import createClient from "openapi-fetch";
import type { components, paths, webhooks } from "./payments.js";

declare const process: { argv: string[] };

type Problem = components["schemas"]["Problem"];
type Outcome =
  webhooks["payment_outcome"]["post"]["requestBody"]["content"]["application/json"];

const client = createClient<paths>({ baseUrl: process.argv[2] ?? "" });

// What may be left out is left out: currency and payment_method.
const charged = await client.POST("/v1/charge", {
  params: { header: { "Idempotency-Key": "typescript" } },
  body: { merchant_order_id: "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9", amount_cents: 1500 },
});
if (charged.data === undefined) throw new Error(charged.error.detail);
const status: "PENDING" | "SUCCESS" | "FAILED" | "REFUNDED" = charged.data.status;

const read = await client.GET("/v1/payments/{payment_id}", {
  params: { path: { payment_id: charged.data.id }, query: { as_of: "2999-01-01T00:00:00Z" } },
});
if (read.data === undefined) throw new Error(read.error.detail);
const created: string = read.data.created_at;

const page = await client.GET("/v1/payments", { params: { query: { limit: 5, currency: "INR" } } });
if (page.data === undefined) throw new Error(page.error.detail);
const cursor: string | null = page.data.next_cursor;

const refused = await client.POST("/v1/refund", {
  params: { header: { "Idempotency-Key": "typescript" } },
  body: { payment_id: charged.data.id, amount_cents: 1501 },
});
if (refused.error === undefined) throw new Error("refunded");
const problem: Problem = refused.error;
export const told = (outcome: Outcome): [string, number] => [outcome.order_id, outcome.sequence];
// @ts-expect-error: not every problem names fields
export const countOf = (problem: Problem): number => problem.errors.length;

console.log(JSON.stringify({ status, created, cursor, code: problem.code, status_of: problem.status }));
